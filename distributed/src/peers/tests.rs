use std::{
    net::TcpListener,
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use super::*;

const LIMIT: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_secs(1);

/// The ranks of a world, as threads with a board or with connections.
fn worlds(world: usize, limit: Duration) -> Vec<Vec<Peers>> {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    let connected = thread::scope(|scope| {
        let ranks: Vec<_> = (0..world)
            .map(|rank| {
                let address = &address;
                scope.spawn(move || Peers::connect(rank, world, address, limit).unwrap())
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    vec![Peers::of_threads(world, limit), connected]
}

fn on_each<T: Send>(ranks: Vec<Peers>, work: impl Fn(Peers) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let work = &work;
        let ranks: Vec<_> =
            ranks.into_iter().map(|peers| scope.spawn(move || work(peers))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn a_launchers_variables_are_read() {
    let of = |given: &[(&str, &str)]| {
        let get = |name| given.iter().find(|(of, _)| *of == name).map(|(_, v)| (*v).to_owned());
        of_variables(get).map_err(|error| error.to_string())
    };
    let ranks = [("RANK", "3"), ("WORLD_SIZE", "8")];
    assert_eq!(of(&ranks), Ok((3, 8, "127.0.0.1:29501".into())));
    let all = [ranks[0], ranks[1], ("MASTER_ADDR", "host"), ("MASTER_PORT", "1234")];
    assert_eq!(of(&all), Ok((3, 8, "host:1235".into())));
    for (wrong, what) in [
        (vec![ranks[1]], "RANK = '' is not possible"),
        (vec![ranks[0], ("WORLD_SIZE", "two")], "WORLD_SIZE = 'two' is not possible"),
        (vec![ranks[0], ranks[1], ("MASTER_PORT", "x")], "MASTER_PORT = 'x' is not possible"),
        (vec![ranks[0], ranks[1], ("MASTER_PORT", "65535")], "at most 65534"),
    ] {
        let error = of(&wrong).unwrap_err();
        assert!(error.contains(what), "{error}");
    }
}

#[test]
fn everybody_hears_everybody() {
    for ranks in worlds(5, LIMIT) {
        on_each(ranks, |peers| {
            for round in 0..20u8 {
                let all = peers.gather(&[peers.rank() as u8, round]).unwrap();
                let expected: Vec<_> = (0..5).map(|rank| vec![rank, round]).collect();
                assert_eq!(all, expected);
            }
        });
    }
}

#[test]
fn other_values_are_named_on_every_rank() {
    for ranks in worlds(3, LIMIT) {
        let errors = on_each(ranks, |peers| {
            peers.agree(&[("heads", "16".into())]).unwrap();
            let rows = if peers.rank() == 1 { "31" } else { "32" };
            peers.agree(&[("heads", "16".into()), ("rows", rows.into())]).unwrap_err().to_string()
        });
        let text = "rank 1 was called with rows = 31, this rank with 32: all need the same";
        assert_eq!([&errors[0], &errors[2]], [text, text]);
        assert!(errors[1].contains("rank 0 was called with rows = 32, this rank with 31"));
    }
}

/// The last meeting of ranks that leave at once, often enough for one to leave between another's two looks.
#[test]
fn a_rank_that_speaks_and_leaves_has_spoken() {
    for _ in 0..2000 {
        let met = on_each(Peers::of_threads(3, LIMIT), |peers| peers.gather(&[1]).map(drop));
        assert!(met.iter().all(Result::is_ok), "{met:?}");
    }
}

/// A rank that panics, leaves, or ends its process is named at once, not after the limit.
#[test]
fn a_rank_that_ends_is_named() {
    for ranks in worlds(3, LIMIT) {
        let begin = Instant::now();
        let errors = on_each(ranks, |peers| {
            peers.gather(&[]).unwrap();
            if peers.rank() == 2 {
                return String::new();
            }
            peers.gather(&[]).unwrap_err().to_string()
        });
        for error in &errors[..2] {
            assert_eq!(error, "rank 2 is lost: it has left before the work was done");
        }
        assert!(begin.elapsed() < LIMIT / 2);
    }
    let (mut ranks, begin) = (Peers::of_threads(2, LIMIT), Instant::now());
    let (one, zero) = (ranks.pop().unwrap(), ranks.pop().unwrap());
    let panicked = thread::spawn(move || {
        let _one = one;
        panic!("on purpose");
    });
    assert_eq!(zero.gather(&[]).unwrap_err().to_string(), "rank 1 is lost: it panicked");
    assert!(panicked.join().is_err() && begin.elapsed() < LIMIT / 2);
}

/// A rank that is there and does not come is named after the limit.
#[test]
fn a_rank_that_stands_still_is_named() {
    let at_exchange = "rank 1 did not come to exchange 1 within 1s";
    let at_meeting = "rank 1 did not come to meeting 1 within 1s";
    for mut ranks in worlds(3, LIMIT) {
        // Ranks take longer to meet, and on a busy machine to be heard of, than to be late.
        ranks.iter_mut().for_each(|peers| peers.limit = SHORT);
        let (both_there, done) = (Barrier::new(2), Barrier::new(3));
        let errors = on_each(ranks, |peers| {
            let mut errors = [String::new(), String::new()];
            if peers.rank() != 1 {
                peers.reach();
                // Processes hear of it with the next sign of life.
                let begin = Instant::now();
                while !errors[0].starts_with(at_exchange) && begin.elapsed() < LIMIT {
                    thread::sleep(SHORT / 100);
                    errors[0] = peers.late().to_string();
                }
                both_there.wait();
                errors[1] = format!("{:?}", peers.gather(&[]).map_err(|error| error.to_string()));
            }
            // Rank 1 stays until nobody waits for it any more.
            done.wait();
            errors
        });
        for [exchange, meeting] in [&errors[0], &errors[2]] {
            assert!(exchange.starts_with(at_exchange), "{exchange}");
            assert!(meeting.starts_with(&format!("Err(\"{at_meeting}")), "{meeting}");
        }
    }
}

#[test]
fn a_rank_that_never_calls_is_named() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = format!("127.0.0.1:{port}");
    let error = Peers::connect(0, 2, &address, SHORT).unwrap_err().to_string();
    assert!(error.starts_with("rank 1 did not come to 127.0.0.1:"), "{error}");
    let error = Peers::connect(1, 2, &address, SHORT).unwrap_err().to_string();
    assert!(error.starts_with("calling rank 0 at 127.0.0.1:"), "{error}");
    let error = Peers::connect(2, 2, &address, SHORT).unwrap_err().to_string();
    assert_eq!(error, "rank = 2 is not possible: with 2 ranks it is below 2");
}

/// The address of rank 0, for the rank that is a process of its own.
const CHILD: &str = "FLASH_ATTENTION_TEST_RANK_0";

/// Rank 1 of [`a_process_that_is_killed_is_named`]: it meets rank 0 once and stays.
#[test]
fn child() {
    let Ok(address) = std::env::var(CHILD) else { return };
    let peers = Peers::connect(1, 2, &address, LIMIT).unwrap();
    peers.gather(b"here").unwrap();
    thread::sleep(LIMIT);
}

#[cfg(unix)]
#[test]
fn a_process_that_is_killed_is_named() {
    for (signal, names) in [
        ("KILL", "rank 1 is lost: it closed its connection: its process has ended"),
        ("STOP", "rank 1 is lost: it has said nothing for "),
    ] {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("127.0.0.1:{port}");
        let mut process = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["peers::tests::child", "--exact"])
            .env(CHILD, &address)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let mut peers = Peers::connect(0, 2, &address, LIMIT).unwrap();
        assert_eq!(peers.gather(&[]).unwrap()[1], b"here");
        peers.check().unwrap();
        let begin = Instant::now();
        let id = process.id().to_string();
        assert!(
            std::process::Command::new("kill")
                .args(["-s", signal, &id])
                .status()
                .unwrap()
                .success()
        );
        if signal == "STOP" {
            // A process takes longer to start, and on a busy machine to be heard, than to be missed.
            peers.silence = SHORT;
        }
        let error = peers.gather(&[]).unwrap_err().to_string();
        let took = begin.elapsed();
        // Before any check fails: a stopped process would stay.
        process.kill().unwrap();
        process.wait().unwrap();
        assert!(error.starts_with(names), "{error}");
        assert!(took < LIMIT / 2, "{took:?}");
    }
}
