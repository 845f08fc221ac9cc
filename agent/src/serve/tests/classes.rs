//! What is wanted now goes before the rest, and the rest still comes.

use super::*;
use crate::transfer::fetch::{Arrivals, Block, Class, Fetcher, Place, Refusal};
use std::ops::Range;
use std::sync::atomic::AtomicU64;

/// Blocks of the background that are asked for.
const REST: u64 = 100;
/// Questions that somebody waits for, at any time.
const WAITED_FOR: u64 = 256;
/// By which the background may be late for each block (`GIVE_WAY` in `transfer/fetch/source.rs`).
const GIVE_WAY: Duration = Duration::from_millis(20);

#[derive(Default)]
struct Counted {
    demand: AtomicU64,
    rest: AtomicU64,
}

impl Arrivals for Counted {
    fn arrived(&self, class: Class, _: Place, block: Result<Block<'_>, Refusal>) {
        assert!(block.is_ok());
        let count = match class {
            Class::Demand => &self.demand,
            Class::Background => &self.rest,
        };
        count.fetch_add(1, Ordering::SeqCst);
    }

    fn mapped(&self, _: Place, _: u32, _: &[Range<u32>]) {}
}

#[test]
fn the_background_has_its_least_share_while_demand_never_ceases() {
    let bench = Bench::new(Duration::ZERO);
    bench.file("big", &random(1, 8 << 20));
    let counted = Arc::new(Counted::default());
    let arrivals: Arc<dyn Arrivals> = Arc::clone(&counted) as _;
    let plan = Arc::new(bench.plan(VolumeId(1)));
    let fetcher = Fetcher::start(plan, options(), &arrivals).unwrap();
    let path: Arc<[u8]> = Arc::from(&b"big"[..]);
    let ask = |class, number: u64| {
        let block = number % (8 << 20 >> 16);
        fetcher.ask(class, Place { file: 1, block }, &path, None);
    };
    let mut asked = 0;
    let mut keep_asking = || {
        let arrived = counted.demand.load(Ordering::SeqCst);
        while asked < arrived + WAITED_FOR {
            ask(Class::Demand, asked);
            asked += 1;
        }
    };
    while counted.demand.load(Ordering::SeqCst) < WAITED_FOR {
        keep_asking();
    }
    let (began, before) = (Instant::now(), counted.demand.load(Ordering::SeqCst));
    for number in 0..REST {
        ask(Class::Background, number);
    }
    while counted.rest.load(Ordering::SeqCst) < REST {
        keep_asking();
        assert!(began.elapsed() < LONG, "the background starves");
    }
    let (took, demand) = (
        began.elapsed(),
        counted.demand.load(Ordering::SeqCst) - before,
    );
    println!("{REST} blocks of the background and {demand} others in {took:?}");
    assert!(
        demand > REST,
        "what is wanted now does not go first: {demand}"
    );
    // Threads that wake late and the connection itself; a machine under test is busy.
    let least = GIVE_WAY * u32::try_from(REST).unwrap();
    assert!(took < least * 3, "{took:?}, where {least:?} are guaranteed");
}
