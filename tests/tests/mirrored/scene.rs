//! A source with a tree, and a process that serves it on a mount, which may be killed.

use super::*;

pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// How long a sync waits for the source.
pub(super) const SYNC_PATIENCE: Duration = Duration::from_secs(2);
/// What a process started by a test does.
pub(super) const ROLE: &str = "LIFEBOAT_MIRRORED_ROLE";
pub(super) const PLACE: &str = "LIFEBOAT_MIRRORED_PLACE";
pub(super) const DOOR: &str = "LIFEBOAT_MIRRORED_DOOR";

/// The directories of one test: the source's tree, the mirror's log beside it, the target's store and mount.
pub(super) struct Place(pub(super) PathBuf);

impl Place {
    pub(super) fn source(&self) -> PathBuf {
        self.0.join("source")
    }
    pub(super) fn log(&self) -> PathBuf {
        self.0.join("log")
    }
    pub(super) fn store(&self) -> PathBuf {
        self.0.join("store")
    }
    pub(super) fn mount(&self) -> PathBuf {
        self.0.join("mount")
    }
    pub(super) fn status(&self) -> PathBuf {
        self.0.join("status")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // It may be unmounted already.
        self.clear();
    }
}

impl Place {
    /// Removes what an earlier run left.
    pub(super) fn clear(&self) {
        for mount in [self.mount(), self.log(), self.store()] {
            let _ = nix::mount::umount2(&mount, nix::mount::MntFlags::MNT_DETACH);
        }
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A process that serves the mount or writes back; killed when it is dropped.
pub(super) struct Actor(Child);

impl Actor {
    pub(super) fn start(role: &str, place: &Place, door: SocketAddr, test: &str) -> Result<Self> {
        let child = Command::new(env::current_exe()?)
            .args(["--exact", test, "--nocapture"])
            .env(ROLE, role)
            .env(PLACE, &place.0)
            .env(DOOR, door.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self(child))
    }

    pub(super) fn kill(&mut self) -> Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.kill();
    }
}

/// Does what this process was started for, if it was by a test.
pub(super) fn act() -> Result<bool> {
    let Ok(role) = env::var(ROLE) else {
        return Ok(false);
    };
    let place = std::mem::ManuallyDrop::new(Place(env::var(PLACE)?.into()));
    if role == "return" {
        write_back(&place.log(), &place.0.join("copy"))?;
        return Ok(true);
    }
    let store = open(&place.store(), env::var(DOOR)?.parse()?, false)?;
    store.mirror(SYNC_PATIENCE)?;
    let _mount = Mount::at(&place.mount(), store.clone(), false)?;
    let parent = nix::unistd::getppid();
    while nix::unistd::getppid() == parent {
        let new = place.0.join("status.new");
        // The disk may be full.
        if fs::write(&new, serde_json::to_vec(&store.mirrored())?).is_ok() {
            fs::rename(new, place.status())?;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(true)
}

/// The store in `directory` of what lies at the source whose data plane is at `addr`.
pub(super) fn open(directory: &Path, addr: SocketAddr, proves: bool) -> Result<Arc<Store>> {
    let admit = Box::new(move || {
        Ok(Grant {
            hop: Hop {
                addr,
                link_key: LinkKey([1; 32]),
            },
            data_key: Some(DataKey([2; 32])),
        })
    });
    let (plan, fleet_key) = (PlanId::from("plan"), FleetKey([3; 32]));
    let plan = FetchPlan::of_source(plan, VolumeId(1), fleet_key, admit);
    let (options, patience) = (options(), SYNC_PATIENCE);
    Ok(Store::open(
        directory, "tree", plan, &options, patience, true, proves,
    )?)
}

pub(super) fn options() -> Options {
    Options {
        patience: Duration::from_secs(5),
        backoff: Duration::from_millis(50),
        ..Options::default()
    }
}

/// The source's data plane, at `addr` when it was there before.
pub(super) fn source(place: &Place, addr: Option<SocketAddr>) -> Result<DataServer> {
    let addr = addr.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 0)));
    let server = wait_for("the source's address", PATIENCE, || {
        Ok(DataServer::bind(addr, options(), None).ok())
    })?;
    server.admit_provide(
        Door::Provide(Role::Target),
        ProvidePlan {
            plan: PlanId::from("plan"),
            link_key: LinkKey([1; 32]),
            sealing: Sealing::Under(DataKey([2; 32])),
            fleet_key: FleetKey([3; 32]),
            volumes: vec![ProvideVolume {
                id: VolumeId(1),
                at: Whereabouts::Here {
                    path: place.source(),
                    mirror: Some(place.log()),
                    times: Default::default(),
                },
            }],
        },
    );
    Ok(server)
}

pub(super) struct Scene {
    pub(super) place: Place,
    server: Option<DataServer>,
    pub(super) door: SocketAddr,
    pub(super) actor: Actor,
    pub(super) test: &'static str,
}

impl Scene {
    /// None where this cannot be run.
    pub(super) fn up(test: &'static str) -> Result<Option<Self>> {
        Self::up_with(test, "")
    }

    /// As [`Self::up`], with what a script adds to the source's tree.
    pub(super) fn up_with(test: &'static str, more: &str) -> Result<Option<Self>> {
        let place = Place(Path::new(env!("CARGO_TARGET_TMPDIR")).join(test));
        Self::up_at(place, test, more)
    }

    pub(super) fn up_at(place: Place, test: &'static str, more: &str) -> Result<Option<Self>> {
        if !is_root() {
            println!("skipped: needs root for the mount");
            return Ok(None);
        }
        place.clear();
        for directory in [place.source(), place.mount()] {
            fs::create_dir_all(directory)?;
        }
        sh(
            &place.source(),
            "mkdir -p d0/d1 d2; head -c 700001 /dev/urandom >d0/n0; head -c 3000 /dev/urandom >n1; \
             head -c 100000 /dev/urandom >d2/n2; ln d2/n2 d0/n3; ln -s n1 n4; mkfifo d2/n5; \
             setfattr -n user.a -v b n1; setfacl -d -m u:7:rwx d2; truncate -s 1M n5",
        )?;
        sh(&place.source(), more)?;
        output(
            Command::new("cp")
                .arg("-a")
                .args([place.source(), place.0.join("copy")]),
        )?;
        let server = source(&place, None)?;
        let door = server.addr();
        let actor = Actor::start("serve", &place, door, test)?;
        let mut scene = Self {
            place,
            server: Some(server),
            door,
            actor,
            test,
        };
        scene.is_mounted()?;
        Ok(Some(scene))
    }

    pub(super) fn is_mounted(&mut self) -> Result<()> {
        let there = self.place.status();
        let actor = &mut self.actor.0;
        wait_for("the mount", PATIENCE, || {
            ensure!(actor.try_wait()?.is_none(), "who serves it ended");
            Ok(there.exists().then_some(()))
        })
    }

    /// Kills who serves the mount and lets another take it up.
    pub(super) fn kill_target(&mut self) -> Result<()> {
        self.actor.kill()?;
        fs::remove_file(self.place.status())?;
        self.actor = Actor::start("serve", &self.place, self.door, self.test)?;
        self.is_mounted()
    }

    pub(super) fn cut_source(&mut self) {
        self.server = None;
    }

    pub(super) fn mend_source(&mut self) -> Result<()> {
        self.server = Some(source(&self.place, Some(self.door))?);
        Ok(())
    }

    pub(super) fn mirrored(&self) -> Result<Mirrored> {
        let read = || Ok(fs::read(self.place.status()).ok());
        let bytes = wait_for("the mirror's figures", PATIENCE, read)?;
        let figures: Option<Mirrored> = serde_json::from_slice(&bytes)?;
        figures.context("it is not mirrored")
    }

    pub(super) fn is_unmirrored(&self) -> Result<()> {
        wait_for("the figures to say so", PATIENCE, || {
            Ok(self.mirrored()?.unmirrored.map(drop))
        })
    }

    pub(super) fn all_is_mirrored(&self) -> Result<Mirrored> {
        wait_for("the source to have all", PATIENCE, || {
            let figures = self.mirrored()?;
            let all = figures.changes == figures.acknowledged && figures.unmirrored.is_none();
            Ok(all.then_some(figures))
        })
    }

    /// Writes the log over a copy of the old tree, killed so many times, and compares it with the mount.
    pub(super) fn return_to_copy(&self, deaths: u32) -> Result<()> {
        let copy = self.place.0.join("copy");
        for death in 0..deaths {
            let mut actor = Actor::start("return", &self.place, self.door, self.test)?;
            std::thread::sleep(Duration::from_millis(u64::from(5 + death * 9)));
            actor.kill()?;
        }
        self.return_to(copy)
    }

    pub(super) fn return_to(&self, copy: PathBuf) -> Result<()> {
        let changes = write_back(&self.place.log(), &copy)?;
        wait_for("the figures to say so", PATIENCE, || {
            Ok((changes > 0 && changes == self.mirrored()?.changes).then_some(()))
        })?;
        ensure!(
            write_back(&self.place.log(), &copy)? == changes,
            "it is done once"
        );
        for (from, to) in [
            (self.place.mount(), copy.clone()),
            (copy, self.place.mount()),
        ] {
            let said = output(
                Command::new("rsync")
                    .args([
                        "-aHAXS",
                        "--checksum",
                        "--delete",
                        "--dry-run",
                        "--itemize-changes",
                        "--modify-window=-1",
                    ])
                    .args([format!("{}/", from.display()), format!("{}/", to.display())]),
            )?;
            ensure!(
                said.trim().is_empty(),
                "{} -> {}:\n{said}",
                from.display(),
                to.display()
            );
        }
        Ok(())
    }
}

pub(super) fn sh(at: &Path, script: &str) -> Result<()> {
    output(Command::new("sh").args(["-ec", script]).current_dir(at)).map(drop)
}
