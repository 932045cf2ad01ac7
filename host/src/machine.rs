//! The computer, and a command's device.

use std::{
    fmt, fs,
    str::FromStr,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::Result;
use device_cust::CustDevice;
use flash_attention::{CpuDevice, Device, backend::gpu::GpuDescription};

use crate::{
    failure::Usage,
    format, interrupt,
    results::{DeviceInfo, Driver, Machine, Options, Results, SCHEMA},
};

/// Where to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A GPU if there is one, else the emulator.
    Auto,
    /// The GPU of that number.
    Gpu(u32),
    /// The emulator.
    Cpu,
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "gpu" => Ok(Self::Gpu(0)),
            _ => text
                .strip_prefix("gpu:")
                .and_then(|index| index.parse().ok())
                .map(Self::Gpu)
                .ok_or_else(|| "use auto, gpu, gpu:1 or cpu".to_owned()),
        }
    }
}

/// A device ready to run kernels.
pub struct Opened {
    /// The device.
    pub device: Arc<dyn Device>,
    /// The device's description in results.
    pub info: DeviceInfo,
    /// The driver, where there is one.
    pub driver: Option<Driver>,
    /// The reason for the emulator, if a GPU was preferred.
    pub why_emulated: Option<String>,
}

/// A command's device, and the reason if it is not a GPU.
impl fmt::Display for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let info = &self.info;
        write!(f, "{}, compute capability {}", info.name, info.compute_capability)?;
        if let Some(bytes) = info.memory_bytes {
            write!(f, ", {}", format::bytes(bytes as f64))?;
        }
        if let Some(driver) = &self.driver {
            let version = driver.version.as_deref().unwrap_or("of unknown version");
            write!(f, ", driver {version}, CUDA {}", driver.cuda)?;
        }
        self.why_emulated.iter().try_for_each(|reason| write!(f, "\n{reason}"))
    }
}

/// Opens the requested device. `memory_limit` is the emulator's memory.
///
/// # Errors
/// When a GPU was requested by name and is unavailable, or has a memory limit.
pub fn open(choice: DeviceChoice, memory_limit: Option<u64>) -> Result<Opened> {
    let gpu = match choice {
        DeviceChoice::Cpu => return Ok(emulator(memory_limit, None)),
        // A limit can be kept by the emulator only, so that is what is meant.
        DeviceChoice::Auto if memory_limit.is_some() => return Ok(emulator(memory_limit, None)),
        DeviceChoice::Auto => CustDevice::open(0),
        DeviceChoice::Gpu(_) if memory_limit.is_some() => {
            let reason = "--memory-limit is the emulator's: use it with --device cpu";
            return Err(Usage(reason.into()).into());
        }
        DeviceChoice::Gpu(index) => CustDevice::open(index),
    };
    match gpu {
        Ok(gpu) => Ok(opened_gpu(gpu)),
        Err(error) if choice == DeviceChoice::Auto => Ok(emulator(None, Some(error.to_string()))),
        Err(error) => Err(error.into()),
    }
}

fn opened_gpu(gpu: CustDevice) -> Opened {
    let description = gpu.description();
    let driver = Some(driver(description));
    let info = DeviceInfo {
        name: description.name.clone(),
        emulated: false,
        compute_capability: capability(description.compute_capability),
        memory_bytes: Some(description.total_bytes),
        shared_bytes: description.max_shared_bytes,
        multiprocessors: description.multiprocessors,
    };
    Opened { device: Arc::new(gpu), info, driver, why_emulated: None }
}

/// The driver's description in results.
#[must_use]
pub fn driver(gpu: &GpuDescription) -> Driver {
    Driver { version: gpu.driver_version.clone(), cuda: capability(gpu.cuda_version) }
}

fn emulator(limit: Option<u64>, why_emulated: Option<String>) -> Opened {
    let limit = limit.or_else(memory_for_the_emulator);
    let device = cpu(limit);
    let info = DeviceInfo {
        name: device.name(),
        emulated: true,
        compute_capability: capability(device.compute_capability()),
        memory_bytes: limit,
        shared_bytes: device.max_shared_bytes(),
        multiprocessors: device.multiprocessors(),
    };
    Opened { device: Arc::new(device), info, driver: None, why_emulated }
}

/// Half of the free memory: inputs are in the host's memory and in the emulated device's, and the
/// oracle holds a widened copy.
#[must_use]
pub fn memory_for_the_emulator() -> Option<u64> {
    available_bytes().map(|bytes| bytes / 2)
}

/// The emulator, with at most `limit` bytes of memory; a signal stops it.
#[must_use]
pub fn cpu(limit: Option<u64>) -> CpuDevice {
    let device = limit.map_or_else(CpuDevice::new, CpuDevice::with_memory_limit);
    device.stopped_by(interrupt::stop())
}

/// A version or compute capability as text: `9.0`.
#[must_use]
pub fn capability((major, minor): (u32, u32)) -> String {
    format!("{major}.{minor}")
}

/// The computer.
#[must_use]
pub fn machine() -> Machine {
    Machine {
        os: std::env::consts::OS.into(),
        arch: std::env::consts::ARCH.into(),
        cpu: fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| cpu_name(&text)),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        memory_bytes: meminfo("MemTotal:"),
    }
}

fn cpu_name(cpuinfo: &str) -> Option<String> {
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn meminfo(key: &str) -> Option<u64> {
    kibibytes(&fs::read_to_string("/proc/meminfo").ok()?, key)
}

fn kibibytes(meminfo: &str, key: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib << 10)
}

/// Available memory: the system's available memory, limited by the container's.
#[must_use]
pub fn available_bytes() -> Option<u64> {
    let available = meminfo("MemAvailable:")?;
    let cgroup = |name: &str| -> Option<u64> {
        fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?.trim().parse().ok()
    };
    let allowed = cgroup("memory.max")
        .zip(cgroup("memory.current"))
        .map(|(max, now)| max.saturating_sub(now));
    Some(allowed.map_or(available, |allowed| allowed.min(available)))
}

/// Results of a command that is about to run, with nothing measured yet.
#[must_use]
pub fn results(command: &str, opened: &Opened, options: Options) -> Results {
    Results {
        schema: SCHEMA,
        command: command.into(),
        created: now(),
        version: env!("CARGO_PKG_VERSION").into(),
        commit: env!("HOST_COMMIT").into(),
        machine: machine(),
        device: opened.info.clone(),
        driver: opened.driver.clone(),
        options,
        ..Results::default()
    }
}

fn now() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    timestamp(since.as_secs())
}

/// UTC by the Gregorian calendar, from seconds since 1970.
fn timestamp(seconds: u64) -> String {
    let (mut days, second) = (seconds / 86_400, seconds % 86_400);
    let leap = |y: u64| (y % 4 == 0 && y % 100 != 0) || y % 400 == 0;
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 0;
    while days >= lengths[month] {
        days -= lengths[month];
        month += 1;
    }
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!("{year:04}-{:02}-{:02}T{hour:02}:{minute:02}:{:02}Z", month + 1, days + 1, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_parse() {
        assert_eq!("gpu:3".parse(), Ok(DeviceChoice::Gpu(3)));
        assert!("gpu:x".parse::<DeviceChoice>().is_err());
    }

    #[test]
    fn times_are_written_as_dates() {
        assert_eq!(timestamp(0), "1970-01-01T00:00:00Z");
        assert_eq!(timestamp(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(timestamp(1_735_689_599), "2024-12-31T23:59:59Z");
    }

    #[test]
    fn system_files_are_understood() {
        assert_eq!(
            kibibytes("MemTotal:  3 kB\nMemAvailable:  2 kB\n", "MemAvailable:"),
            Some(2048)
        );
        let text = "processor : 0\nmodel name\t: A CPU @ 2GHz\n";
        assert_eq!(cpu_name(text).as_deref(), Some("A CPU @ 2GHz"));
    }
}
