//! The cost of a step on paper, for any number of GPUs: the schedule of [`Attention`](crate::Attention) with
//! measured times of kernels and links in place of kernels and links.
//!
//! A GPU has two lanes, as an [`Engine`](crate::engine::Engine). A step of the ring computes for
//! `max(launch, FLOP / speed)`, merges at the memory's speed, and passes a block on for
//! `latency + bytes / bandwidth`; the next begins when both are done.

use crate::schedule::{Grid, Order, Part, parts, segments, source};
use flash_attention::Window;

/// Measured properties of GPUs and what links them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Machine {
    /// FLOP per second of the forward kernel, of a problem that fills the GPU.
    pub forward: f64,
    /// FLOP per second of the backward pass, by its convention of 2.5 times the forward's FLOP.
    pub backward: f64,
    /// Seconds that the shortest part takes.
    pub launch: f64,
    /// Bytes per second of the GPU's memory.
    pub memory: f64,
    /// Bytes per second that a GPU sends to another of its host.
    pub link: f64,
    /// Bytes per second that a GPU sends to another host.
    pub network: f64,
    /// Seconds until a transfer begins.
    pub latency: f64,
    /// GPUs of a host.
    pub host: usize,
    /// The share of its speed that a kernel keeps while a transfer runs.
    pub beside_transfers: f64,
}

/// One H200 of eight on NVLink, hosts linked by 400 Gbit/s for each GPU. Kernels at the speed that
/// `compare` measured with D 128, a link's by a copy from one card to the other; the network's is its
/// data sheet's.
pub const H200: Machine = Machine {
    forward: 680e12,
    backward: 500e12,
    launch: 10e-6,
    memory: 4.0e12,
    link: 393e9,
    network: 50e9,
    latency: 15e-6,
    host: 8,
    beside_transfers: 0.97,
};

/// Self-attention that GPUs share, of one batch entry and 16-bit elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Tokens.
    pub tokens: usize,
    /// Heads of Q.
    pub heads: usize,
    /// Heads of K and V.
    pub kv_heads: usize,
    /// Elements of a row.
    pub head_dim: usize,
    /// Whether it is causal.
    pub causal: bool,
    /// Whether it is the backward pass.
    pub backward: bool,
}

/// A model's prediction for a pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// Seconds of the slowest GPU.
    pub seconds: f64,
    /// Seconds of one GPU that does everything.
    pub alone: f64,
    /// Seconds of the transfers of one GPU.
    pub transfers: f64,
    /// Seconds of transfers that computation does not hide.
    pub exposed: f64,
    /// Bytes that a GPU sends.
    pub bytes: f64,
}

impl Prediction {
    /// Speed against `gpus` times that of one.
    #[must_use]
    pub fn efficiency(&self, gpus: usize) -> f64 {
        self.alone / (self.seconds * gpus as f64)
    }

    /// The share of the transfers that computation hides; 1 where there are none.
    #[must_use]
    pub fn hidden(&self) -> f64 {
        if self.transfers == 0.0 {
            return 1.0;
        }
        // Rounding may leave a little less than nothing.
        (1.0 - self.exposed / self.transfers).max(0.0) + 0.0
    }
}

impl Work {
    fn flops(&self, pairs: f64) -> f64 {
        let of_forward = 4.0 * self.heads as f64 * pairs * self.head_dim as f64;
        if self.backward { 2.5 * of_forward } else { of_forward }
    }

    const fn window(&self) -> Window {
        Window { left: None, right: if self.causal { Some(0) } else { None } }
    }
}

impl Machine {
    /// Seconds of a part of `pairs` pairs of row and key.
    fn compute(&self, work: &Work, pairs: f64) -> f64 {
        let speed = if work.backward { self.backward } else { self.forward };
        (work.flops(pairs) / speed).max(self.launch)
    }

    /// Simulates a pass over the GPUs of a grid, whose ranks fill host after host.
    #[must_use]
    pub fn predict(&self, work: &Work, grid: Grid) -> Prediction {
        let (n, window) = (work.tokens, work.window());
        let alone = self.compute(work, window.visible_pairs(n, n) as f64);
        let own = Work {
            heads: work.heads / grid.heads,
            kv_heads: work.kv_heads.div_ceil(grid.heads),
            ..*work
        };
        // Neighbours of the ring are as many ranks apart as divide the heads.
        let ring_link = if grid.ranks() <= self.host { self.link } else { self.network };
        let group_link = if grid.heads <= self.host { self.link } else { self.network };
        let row = (2 * work.head_dim) as f64;
        let rows = n as f64 / grid.ranks() as f64;

        // All-to-all: of Q, K, V and O, and of their gradients, all but a rank's own share.
        let (q, kv) = (work.heads as f64 * row, work.kv_heads as f64 * row);
        let per_row = if work.backward { 4.0 * q + 4.0 * kv } else { 2.0 * q + 2.0 * kv };
        let others = 1.0 - 1.0 / grid.heads as f64;
        let group_bytes = rows * per_row * others;
        let exchanges = if grid.heads > 1 { 2.0 } else { 0.0 };
        let group_seconds = group_bytes / group_link + exchanges * self.latency;

        let members = grid.context;
        let order = Order::of(window);
        let block_rows = n as f64 / members as f64;
        let block = block_rows * 2.0 * own.kv_heads as f64 * row;
        let block_seconds = self.latency + block / ring_link;
        // Sums of dK and dV are f32.
        let sums_seconds = self.latency + 2.0 * block / ring_link;
        let merged_bytes_of_row = if work.backward { 10.0 } else { 8.0 } * own.heads as f64;
        let mut slowest = (0.0, 0.0);
        let mut ring_seconds = 0.0;
        for c in 0..members.min(2).max(usize::from(members > 0)) {
            let rows = segments(n, order, members, c);
            let (mut seconds, mut computed) = (0.0, 0.0);
            ring_seconds = 0.0;
            for step in 0..members {
                let keys = segments(n, order, members, source(members, c, step));
                let all = parts(&rows, &keys, window, [n, n]);
                let kernel: f64 = all.iter().map(|p| self.compute(&own, p.pairs() as f64)).sum();
                let merge = |p: &Part| {
                    p.rows.len() as f64 * merged_bytes_of_row * work.head_dim as f64 / self.memory
                };
                let merge = if members > 1 { all.iter().map(merge).sum() } else { 0.0 };
                let passes = if step + 1 < members { block_seconds } else { 0.0 };
                // The sums of the step before come while this one computes; the last have nothing to
                // hide behind.
                let sums = if work.backward && step > 0 { sums_seconds } else { 0.0 };
                let transfer = passes + sums;
                ring_seconds += transfer;
                let beside = if transfer > 0.0 { self.beside_transfers } else { 1.0 };
                // Kernels are slower only as long as a transfer runs.
                let kernel = kernel + (1.0 / beside - 1.0) * transfer.min(kernel);
                computed += kernel + merge;
                seconds += (kernel + merge).max(transfer);
            }
            if work.backward && members > 1 {
                ring_seconds += sums_seconds;
                seconds += sums_seconds;
            }
            if seconds > slowest.0 {
                slowest = (seconds, computed);
            }
        }
        let (ring, computed) = slowest;
        let seconds = ring + group_seconds;
        Prediction {
            seconds,
            alone,
            transfers: ring_seconds + group_seconds,
            exposed: seconds - computed,
            bytes: group_bytes
                + (members - 1) as f64 * block
                + if work.backward && members > 1 { 2.0 * block * members as f64 } else { 0.0 },
        }
    }

    /// The least tokens for each GPU from which the ring's forward pass is hidden: a block arrives before
    /// the rows that are there have been computed with the one before.
    ///
    /// With `c` rows and keys on each GPU a step takes `4 H c² D / speed`, halved if causal, and a block
    /// of `4 Hkv c D` bytes `4 Hkv c D / bandwidth`: `c = Hkv / H · speed / bandwidth`, twice if causal,
    /// without the latency.
    #[must_use]
    pub fn hidden_from(&self, work: &Work, link: f64) -> f64 {
        let causal = if work.causal { 2.0 } else { 1.0 };
        causal * work.kv_heads as f64 / work.heads as f64 * self.forward / link
    }
}

/// The chapter's table: tokens for each GPU stay, GPUs become more.
#[must_use]
pub fn table(machine: &Machine, tokens_per_gpu: usize) -> String {
    let mut text = String::from(
        "| GPUs | heads x context | tokens | forward ms | hidden | efficiency | backward ms | hidden | efficiency |\n\
         |---|---|---|---|---|---|---|---|---|\n",
    );
    for gpus in (1..=10).map(|power| 1 << power) {
        let grids = [
            (Grid::of_heads(gpus), gpus <= 8),
            (Grid::of_context(gpus), true),
            (Grid { heads: 8, context: gpus / 8 }, gpus > 8),
        ];
        for (grid, _) in grids.into_iter().filter(|(_, is_possible)| *is_possible) {
            let work = |backward| Work {
                tokens: tokens_per_gpu * gpus,
                heads: 16,
                kv_heads: 8,
                head_dim: 128,
                causal: true,
                backward,
            };
            let [forward, backward] = [false, true].map(|b| machine.predict(&work(b), grid));
            let columns = |p: Prediction| {
                format!(
                    "{:.2} | {:.0} % | {:.3}",
                    p.seconds * 1e3,
                    p.hidden() * 100.0,
                    p.efficiency(gpus)
                )
            };
            text += &format!(
                "| {gpus} | {} x {} | {}k | {} | {} |\n",
                grid.heads,
                grid.context,
                work(false).tokens >> 10,
                columns(forward),
                columns(backward)
            );
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORK: Work = Work {
        tokens: 1 << 16,
        heads: 16,
        kv_heads: 8,
        head_dim: 128,
        causal: false,
        backward: false,
    };

    /// A link without limits leaves the kernels, which add up to one GPU's.
    #[test]
    fn without_a_price_for_transfers_work_is_divided() {
        let free = Machine {
            link: f64::INFINITY,
            network: f64::INFINITY,
            latency: 0.0,
            memory: f64::INFINITY,
            launch: 0.0,
            beside_transfers: 1.0,
            ..H200
        };
        for backward in [false, true] {
            for grid in [Grid::of_heads(8), Grid::of_context(8), Grid { heads: 4, context: 16 }] {
                let work = Work { backward, ..WORK };
                let prediction = free.predict(&work, grid);
                let efficiency = prediction.efficiency(grid.ranks());
                assert!((efficiency - 1.0).abs() < 1e-9, "{grid:?}: {efficiency}");
                let causal = Work { causal: true, ..work };
                let efficiency = free.predict(&causal, grid).efficiency(grid.ranks());
                // Chunks of the diagonal are whole rows: a little more than half of the pairs.
                assert!((efficiency - 1.0).abs() < 1e-3, "{grid:?}: {efficiency}");
            }
        }
    }

    /// Bytes by hand: two GPUs exchange a block of half the keys, and half of what each holds of all heads.
    #[test]
    fn bytes_are_those_of_the_chapter() {
        let ring = H200.predict(&WORK, Grid::of_context(2));
        assert_eq!(ring.bytes, f64::from(1 << 15) * 2.0 * 8.0 * 256.0);
        let heads = H200.predict(&WORK, Grid::of_heads(2));
        assert_eq!(heads.bytes, f64::from(1 << 15) * (2.0 * 16.0 + 2.0 * 8.0) * 256.0 / 2.0);
    }

    /// The ring is hidden from as many tokens on as the formula says.
    #[test]
    fn the_ring_is_hidden_from_where_the_formula_says() {
        let machine = Machine {
            latency: 0.0,
            launch: 0.0,
            beside_transfers: 1.0,
            memory: f64::INFINITY,
            ..H200
        };
        for causal in [false, true] {
            let work = Work { causal, ..WORK };
            let least = machine.hidden_from(&work, machine.link);
            for (factor, is_hidden) in [(0.8, false), (1.3, true)] {
                let tokens = (least * factor) as usize * 8;
                let prediction = machine.predict(&Work { tokens, ..work }, Grid::of_context(8));
                assert_eq!(prediction.hidden() > 0.999, is_hidden, "{causal} {factor}");
            }
        }
    }

    /// The chapter has the table that this program makes.
    #[test]
    fn the_chapter_has_this_table() {
        let chapter = include_str!("../../docs/distributed.md");
        for tokens in [4 << 10, 32 << 10] {
            let table = table(&H200, tokens);
            assert!(chapter.contains(&table), "put this table into docs/distributed.md:\n{table}");
        }
    }
}
