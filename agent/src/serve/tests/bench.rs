//! A source over a wire that delays and is cut, and stores of its tree.

use super::*;

/// Carries connections to `to`, each byte so much later; cut, it carries none, and frozen nothing more over those it has.
pub(super) struct Wire {
    frozen: Arc<AtomicBool>,
    pub(super) addr: SocketAddr,
    cut: Arc<AtomicBool>,
    ends: Arc<Mutex<Vec<TcpStream>>>,
}

impl Wire {
    pub(super) fn to(to: SocketAddr, delay: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let wire = Self {
            addr: listener.local_addr().unwrap(),
            cut: Arc::default(),
            frozen: Arc::default(),
            ends: Arc::default(),
        };
        let (cut, ends) = (Arc::clone(&wire.cut), Arc::clone(&wire.ends));
        let frozen = Arc::clone(&wire.frozen);
        std::thread::spawn(move || {
            for caller in listener.incoming().flatten() {
                if cut.load(Ordering::Acquire) {
                    continue;
                }
                let Ok(callee) = TcpStream::connect(to) else {
                    continue;
                };
                for (from, into) in [(&caller, &callee), (&callee, &caller)] {
                    from.set_nodelay(true).unwrap();
                    let (from, into) = (from.try_clone().unwrap(), into.try_clone().unwrap());
                    ends.lock().unwrap().push(from.try_clone().unwrap());
                    carry(from, into, delay, Arc::clone(&frozen));
                }
            }
        });
        wire
    }

    pub(super) fn freeze(&self) {
        self.frozen.store(true, Ordering::Release);
    }

    pub(super) fn cut(&self, cut: bool) {
        self.cut.store(cut, Ordering::Release);
        for end in self.ends.lock().unwrap().drain(..) {
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}

pub(super) fn carry(
    mut from: TcpStream,
    mut into: TcpStream,
    delay: Duration,
    frozen: Arc<AtomicBool>,
) {
    let (sender, receiver) = channel::<(Instant, Vec<u8>)>();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            if sender
                .send((Instant::now() + delay, buffer[..n].to_vec()))
                .is_err()
            {
                return;
            }
        }
    });
    std::thread::spawn(move || {
        for (due, bytes) in receiver {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            if frozen.load(Ordering::Acquire) {
                continue;
            }
            if into.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = into.shutdown(Shutdown::Both);
    });
}

pub(super) struct Bench {
    pub(super) dir: tempfile::TempDir,
    pub(super) source: PathBuf,
    pub(super) server: DataServer,
    pub(super) wire: Wire,
}

impl Bench {
    pub(super) fn new(delay: Duration) -> Self {
        // On the disk under test; `/tmp` may be a tmpfs without holes.
        let dir = tempfile::tempdir_in(concat!(env!("CARGO_MANIFEST_DIR"), "/../target")).unwrap();
        let source = dir.path().join("source");
        fs::create_dir(&source).unwrap();
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        let server = DataServer::bind(loopback, options(), None).unwrap();
        let volumes = vec![
            ProvideVolume {
                id: VolumeId(1),
                at: Whereabouts::Here {
                    path: source.clone(),
                    mirror: Some(dir.path().join("mirror")),
                    times: Default::default(),
                },
            },
            ProvideVolume {
                id: VolumeId(2),
                at: Whereabouts::Here {
                    path: source.join("disk.img"),
                    mirror: None,
                    times: Default::default(),
                },
            },
        ];
        let plan = |link_key, sealing| ProvidePlan {
            plan: PlanId::from("plan"),
            link_key: LinkKey(link_key),
            sealing,
            fleet_key: FleetKey([3; 32]),
            volumes: volumes.clone(),
        };
        let target = plan([1; 32], Sealing::Under(DataKey([2; 32])));
        server.admit_provide(Door::Provide(Role::Target), target);
        let trusts = Arc::new(|address: IpAddr| address.is_loopback());
        let paired = plan([4; 32], Sealing::Plain(trusts));
        server.admit_provide(Door::Provide(Role::Paired), paired);
        let wire = Wire::to(server.addr(), delay);
        Self {
            dir,
            source,
            server,
            wire,
        }
    }

    pub(super) fn open(&self, patience: Duration) -> Arc<Store> {
        self.open_volume(VolumeId(1), patience, false)
    }

    pub(super) fn plan(&self, volume: VolumeId) -> FetchPlan {
        let addr = self.wire.addr;
        let admit = granted(addr, LinkKey([1; 32]), Some(DataKey([2; 32])));
        FetchPlan::of_source(PlanId::from("plan"), volume, FleetKey([3; 32]), admit)
    }

    pub(super) fn open_volume(
        &self,
        volume: VolumeId,
        patience: Duration,
        proves: bool,
    ) -> Arc<Store> {
        Store::open(
            &self.dir.path().join("store"),
            "data",
            self.plan(volume),
            &options(),
            patience,
            false,
            proves,
        )
        .unwrap()
    }

    pub(super) fn file(&self, name: &str, bytes: &[u8]) {
        fs::write(self.source.join(name), bytes).unwrap();
    }
}

pub(super) fn granted(addr: SocketAddr, link_key: LinkKey, data_key: Option<DataKey>) -> Admit {
    Box::new(move || {
        Ok(Grant {
            hop: Hop {
                addr,
                link_key: link_key.clone(),
            },
            data_key: data_key.clone(),
        })
    })
}

pub(super) fn options() -> Options {
    Options {
        patience: Duration::from_secs(2),
        backoff: Duration::from_millis(20),
        ..Options::default()
    }
}

pub(super) fn random(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes
}

/// A file of the served tree with the number of its origin.
pub(super) struct Served {
    pub(super) file: File,
    pub(super) number: Option<u32>,
}

pub(super) fn served(store: &Store, name: &str) -> Served {
    let path = format!(
        "/proc/self/fd/{}/{name}",
        std::os::fd::AsRawFd::as_raw_fd(&store.data().fd())
    );
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let number = store.number(file.metadata().unwrap().ino());
    Served { file, number }
}

impl Served {
    pub(super) fn read(
        &self,
        store: &Store,
        offset: u64,
        length: usize,
    ) -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        let read = store.read(&self.file, self.number, &mut bytes, offset)?;
        bytes.truncate(read);
        Ok(bytes)
    }
}

pub(super) fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub(super) fn is_eio<T: std::fmt::Debug>(result: std::io::Result<T>) -> bool {
    result.is_err_and(|error| error.raw_os_error() == Some(nix::errno::Errno::EIO as i32))
}
