//! A paired device that answers in the source's stead: over its own data plane, with each link apart.

use super::*;
use crate::transfer::fetch::{StandIn, Stock};

/// A paired device between a source and its target.
struct Paired {
    server: DataServer,
    stock: Arc<Stock>,
    /// The target's link to it.
    wire: Wire,
    /// Its link to the source.
    behind: Wire,
}

impl Paired {
    fn of(bench: &Bench, volume: VolumeId) -> Self {
        let behind = Wire::to(bench.server.addr(), Duration::ZERO);
        let plan = FetchPlan {
            admit: granted(behind.addr, LinkKey([4; 32]), None),
            insists: false,
            ..bench.plan(volume)
        };
        let stock = Stock::start(plan, &options(), bench.dir.path()).unwrap();
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        let server = DataServer::bind(loopback, options(), None).unwrap();
        let plan = ProvidePlan {
            plan: PlanId::from("plan"),
            link_key: LinkKey([5; 32]),
            sealing: Sealing::Under(DataKey([6; 32])),
            fleet_key: FleetKey([3; 32]),
            volumes: vec![ProvideVolume {
                id: volume,
                at: Whereabouts::There(Arc::clone(&stock)),
            }],
        };
        server.admit_provide(Door::StandIn(volume), plan);
        let wire = Wire::to(server.addr(), Duration::ZERO);
        Self {
            server,
            stock,
            wire,
            behind,
        }
    }

    /// The target's store of what it answers.
    fn open(&self, bench: &Bench, volume: VolumeId, patience: Duration) -> Arc<Store> {
        let admit = granted(self.wire.addr, LinkKey([5; 32]), Some(DataKey([6; 32])));
        let plan = FetchPlan {
            stand_in: Some(StandIn { admit, lists: true }),
            ..bench.plan(volume)
        };
        let store = bench.dir.path().join("store");
        Store::open(&store, "data", plan, &options(), patience, false, false).unwrap()
    }
}

/// What the source read for each, and what went to each over the wire.
fn given(bench: &Bench, role: Role) -> (u64, u64) {
    let plan = PlanId::from("plan");
    let spent = bench.server.spent(&plan, Door::Provide(role));
    (spent.read.0, spent.wire.0)
}

fn is_same(bench: &Bench) {
    let status = std::process::Command::new("diff")
        .args(["--recursive", "--no-dereference"])
        .arg(&bench.source)
        .arg(bench.dir.path().join("store/data"))
        .status();
    assert!(status.unwrap().success());
}

#[test]
fn the_source_answers_the_paired_device_alone_and_each_block_once() {
    let bench = Bench::new(Duration::ZERO);
    let big = random(1, 3_000_003);
    bench.file("big", &big);
    bench.file("small", b"hello");
    bench.file("zeros", &vec![0; 300_000]);
    fs::create_dir(bench.source.join("deep")).unwrap();
    bench.file("deep/other", &random(2, 70_000));
    let hole = File::create(bench.source.join("hole")).unwrap();
    hole.set_len(5 << 20).unwrap();
    hole.write_all_at(b"end", (5 << 20) - 3).unwrap();
    let all = 3_000_003 + 5 + 300_000 + 70_000 + (5 << 20);

    let paired = Paired::of(&bench, VolumeId(1));
    let store = paired.open(&bench, VolumeId(1), LONG);
    let file = served(&store, "big");
    // The same blocks by many readers at once, and by the background.
    let filler = Filler::start(&store, FetchOrder::default()).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for at in (0..big.len()).step_by(50_000).rev() {
                    let length = 1000.min(big.len() - at);
                    let read = file.read(&store, at as u64, length).unwrap();
                    assert_eq!(read, big[at..at + length]);
                }
            });
        }
    });
    wait("everything to be here", || store.figures().detached);
    drop(filler);
    is_same(&bench);
    let figures = store.figures();
    assert_eq!(figures.from_source, 0);
    // Zeros come without their bytes.
    assert!(figures.from_paired >= 3_070_000);
    assert_eq!(given(&bench, Role::Target), (0, 0));
    assert_eq!(given(&bench, Role::Paired).0, all, "each block once");
    let turnover = paired.stock.turnover();
    assert!((3_070_000..3_300_000).contains(&turnover.fetched));
    assert!(turnover.answered >= turnover.fetched);
}

#[test]
fn what_it_has_it_answers_when_the_source_is_gone_and_a_new_copy_begins_anew() {
    let bench = Bench::new(Duration::ZERO);
    let (one, two) = (random(1, 1_000_000), random(2, 1_000_000));
    bench.file("disk.img", &one);
    let volume = VolumeId(2);
    let paired = Paired::of(&bench, volume);
    let store = paired.open(&bench, volume, LONG);
    paired.stock.fill();
    wait("all of it to be fetched ahead", || {
        paired.stock.turnover().fetched == 1_000_000
    });
    assert_eq!(store.figures().on_demand, 0);
    // No device of the lab reaches the source any more.
    bench.wire.cut(true);
    paired.behind.cut(true);
    let read = served(&store, "content").read(&store, 0, 1_000_000);
    assert_eq!(read.unwrap(), one);
    assert_eq!(given(&bench, Role::Target), (0, 0));
    drop(store);
    paired.server.dismiss(&PlanId::from("plan"));

    bench.wire.cut(false);
    fs::remove_dir_all(bench.dir.path().join("store")).unwrap();
    bench.file("disk.img", &two);
    let paired = Paired::of(&bench, volume);
    let store = paired.open(&bench, volume, LONG);
    let read = served(&store, "content").read(&store, 0, 1_000_000);
    assert_eq!(read.unwrap(), two, "what was read before the list");
}

#[test]
fn reads_fall_back_to_the_source_when_it_is_gone_or_does_not_reach_the_source_and_return_to_it() {
    let bench = Bench::new(Duration::ZERO);
    let big = random(1, 4 << 20);
    bench.file("big", &big);
    let paired = Paired::of(&bench, VolumeId(1));
    let store = paired.open(&bench, VolumeId(1), LONG);
    let file = served(&store, "big");
    let read = |block: usize| {
        let at = block << 16;
        let began = Instant::now();
        let read = file.read(&store, at as u64, 1 << 16).unwrap();
        assert_eq!(read, big[at..at + (1 << 16)]);
        began.elapsed()
    };
    read(0);
    assert_eq!(given(&bench, Role::Target).0, 0);
    // Dead: its host resets what reaches it.
    paired.wire.cut(true);
    read(10);
    assert!(given(&bench, Role::Target).0 > 0);
    // Alive, and without a way to the source.
    paired.behind.cut(true);
    paired.wire.cut(false);
    let before = given(&bench, Role::Target).0;
    let mut block = 12;
    wait("the source to be asked for what it cannot have", || {
        read(block);
        block += 2;
        given(&bench, Role::Target).0 > before
    });
    paired.behind.cut(false);
    let before = store.figures().from_paired;
    wait("it to be asked again", || {
        read(block);
        block += 1;
        assert!(block < 60);
        std::thread::sleep(Duration::from_millis(200));
        store.figures().from_paired > before
    });
}

#[test]
fn a_paired_device_that_is_never_there_delays_nobody_for_long() {
    let bench = Bench::new(Duration::ZERO);
    let big = random(1, 1 << 20);
    bench.file("big", &big);
    // It takes connections, and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let admit = granted(
        silent.local_addr().unwrap(),
        LinkKey([5; 32]),
        Some(DataKey([6; 32])),
    );
    let plan = FetchPlan {
        stand_in: Some(StandIn { admit, lists: true }),
        ..bench.plan(VolumeId(1))
    };
    let store = bench.dir.path().join("store");
    let store = Store::open(&store, "data", plan, &options(), LONG, false, false).unwrap();
    let began = Instant::now();
    let file = served(&store, "big");
    assert_eq!(file.read(&store, 0, 1 << 20).unwrap(), big);
    // Patience with it once, for both classes at the same time.
    assert!(began.elapsed() < options().patience * 3);
    let began = Instant::now();
    let other = random(2, 100);
    bench.file("other", &other);
    assert_eq!(file.read(&store, 100, 100).unwrap(), big[100..200]);
    assert!(began.elapsed() < Duration::from_secs(1));
    assert_eq!(store.figures().from_paired, 0);
    // One that falls silent while it is asked: patience with it once more.
    let paired = Paired::of(&bench, VolumeId(1));
    bench.file("late", &big);
    fs::remove_dir_all(bench.dir.path().join("store")).unwrap();
    let store = paired.open(&bench, VolumeId(1), LONG);
    let file = served(&store, "late");
    assert_eq!(file.read(&store, 0, 100).unwrap(), big[..100]);
    paired.wire.freeze();
    let began = Instant::now();
    assert_eq!(file.read(&store, 0, 1 << 20).unwrap(), big);
    assert!(
        began.elapsed() < options().patience * 3 / 2,
        "{:?}",
        began.elapsed()
    );
}

#[test]
fn holes_are_told_by_it_and_a_file_that_is_gone_is_gone_there_too() {
    let bench = Bench::new(Duration::ZERO);
    let sparse = File::create(bench.source.join("sparse")).unwrap();
    sparse.set_len(64 << 20).unwrap();
    sparse.write_all_at(&random(1, 1 << 20), 32 << 20).unwrap();
    bench.file("lost", &random(3, 100_000));
    let paired = Paired::of(&bench, VolumeId(1));
    let store = paired.open(&bench, VolumeId(1), LONG);
    let file = served(&store, "sparse");
    store.learn_holes(file.number, 0, 64 << 20);
    let extents = store.extents(&file.file, file.number, 0..64 << 20, 16);
    let extents: Vec<_> = extents
        .unwrap()
        .iter()
        .map(|extent| (extent.length, extent.is_hole))
        .collect();
    assert_eq!(
        extents,
        [(32 << 20, true), (1 << 20, false), (31 << 20, true)]
    );
    fs::remove_file(bench.source.join("lost")).unwrap();
    assert!(is_eio(served(&store, "lost").read(&store, 0, 10)));
    assert_eq!(given(&bench, Role::Target), (0, 0));
    drop(paired);
}

#[test]
fn nothing_goes_unsealed_to_an_address_that_is_not_trusted() {
    let bench = Bench::new(Duration::ZERO);
    let big = random(1, 1 << 20);
    bench.file("big", &big);
    let plan = ProvidePlan {
        plan: PlanId::from("plan"),
        link_key: LinkKey([4; 32]),
        sealing: Sealing::Plain(Arc::new(|address| !address.is_loopback())),
        fleet_key: FleetKey([3; 32]),
        volumes: vec![ProvideVolume {
            id: VolumeId(1),
            at: Whereabouts::Here {
                path: bench.source.clone(),
                mirror: None,
                times: Default::default(),
            },
        }],
    };
    bench
        .server
        .admit_provide(Door::Provide(Role::Paired), plan);
    let paired = Paired::of(&bench, VolumeId(1));
    let store = paired.open(&bench, VolumeId(1), LONG);
    let file = served(&store, "big");
    assert_eq!(file.read(&store, 0, 1 << 20).unwrap(), big);
    assert_eq!(given(&bench, Role::Paired), (0, 0));
    assert_eq!(given(&bench, Role::Target).0, 1 << 20);
}

#[test]
fn one_that_lives_and_has_no_answer_is_not_waited_for() {
    let bench = Bench::new(Duration::ZERO);
    let big = random(1, 1 << 20);
    bench.file("big", &big);
    let mut paired = Paired::of(&bench, VolumeId(1));
    // The source does not say for long whether it lets the paired device in.
    let plan = FetchPlan {
        admit: Box::new(|| {
            std::thread::sleep(Duration::from_secs(20));
            Err("at last".to_owned())
        }),
        insists: false,
        ..bench.plan(VolumeId(1))
    };
    paired.stock = Stock::start(plan, &options(), bench.dir.path()).unwrap();
    let plan = ProvidePlan {
        plan: PlanId::from("plan"),
        link_key: LinkKey([5; 32]),
        sealing: Sealing::Under(DataKey([6; 32])),
        fleet_key: FleetKey([3; 32]),
        volumes: vec![ProvideVolume {
            id: VolumeId(1),
            at: Whereabouts::There(Arc::clone(&paired.stock)),
        }],
    };
    paired
        .server
        .admit_provide(Door::StandIn(VolumeId(1)), plan);
    let admit = granted(paired.wire.addr, LinkKey([5; 32]), Some(DataKey([6; 32])));
    let plan = FetchPlan {
        stand_in: Some(StandIn {
            admit,
            lists: false,
        }),
        ..bench.plan(VolumeId(1))
    };
    let store = bench.dir.path().join("store");
    let store = Store::open(&store, "data", plan, &options(), LONG, false, false).unwrap();
    let began = Instant::now();
    assert_eq!(served(&store, "big").read(&store, 0, 1 << 20).unwrap(), big);
    let took = began.elapsed();
    assert!(took < options().patience * 4, "{took:?}");
    assert!(given(&bench, Role::Target).0 > 0);
}
