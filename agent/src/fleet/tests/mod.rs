//! Tests of the room over real sockets, real TLS and a real registry, on loopback addresses of their own.

mod allocation;
mod channel;
mod enrolment;
mod lending;
mod pairing;

use super::agent::{PairedState, router};
use super::ca::{Ca, init};
use super::client::ControlClient;
use super::duplicator::{Duplicator, HeartbeatAnswer, Settings};
use super::enrol::{JoinToken, invite, join};
use super::identity::Identity;
use super::now;
use super::registry::Heartbeat;
use super::server::ControlServer;
use super::sqlite::SqliteRegistry;
use crate::model::fleet::{Configuration, DeviceVerdict, Nic, PeerAddress, Utilisation};
use crate::model::ids::{DeviceId, PlanId};
use crate::model::units::Bytes;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tokio_util::sync::{CancellationToken, DropGuard};

/// An address nobody else on this machine uses: all of 127.0.0.0/8 is loopback.
fn loopback() -> SocketAddr {
    let [a, b, c]: [u8; 3] = rand::random();
    SocketAddr::from((Ipv4Addr::new(127, a.max(1), b, c.clamp(1, 254)), 7440))
}

/// A fleet whose duplicator runs until it is dropped.
struct Fleet {
    dir: TempDir,
    duplicator: PeerAddress,
    identity: Arc<Identity>,
    registry: SqliteRegistry,
    _stop: DropGuard,
}

impl Fleet {
    async fn start() -> Self {
        let dir = TempDir::new().unwrap();
        let address = loopback();
        let identity = Arc::new(init(dir.path(), address).unwrap());
        let registry = SqliteRegistry::open(&SqliteRegistry::path(dir.path())).unwrap();
        let server = ControlServer::bind(&identity, address).await.unwrap();
        let duplicator = Arc::new(
            Duplicator::new(
                identity.clone(),
                Ca::load(dir.path()).unwrap(),
                registry.clone(),
                Settings::default(),
            )
            .unwrap(),
        );
        let stop = CancellationToken::new();
        tokio::spawn(server.serve_enrolling(
            duplicator.members(),
            duplicator.strangers(),
            stop.clone(),
        ));
        Self {
            dir,
            duplicator: identity.duplicator().clone(),
            identity,
            registry,
            _stop: stop.drop_guard(),
        }
    }

    async fn token(&self, device: Option<&str>, lifetime: Duration) -> JoinToken {
        let device = device.map(DeviceId::from);
        invite(self.dir.path(), &self.registry, device, lifetime, now())
            .await
            .unwrap()
    }

    /// Enrols a device whose agent serves the routes of a lent device.
    async fn device(&self, id: &str) -> TestDevice {
        let dir = TempDir::new().unwrap();
        let token = self.token(None, Duration::from_secs(60)).await;
        let identity = join(dir.path(), &token, id.into(), loopback())
            .await
            .unwrap();
        TestDevice::serve(dir, identity).await
    }
}

/// A device whose agent runs until it is dropped.
struct TestDevice {
    dir: TempDir,
    identity: Arc<Identity>,
    client: ControlClient,
    state: Arc<PairedState>,
    address: PeerAddress,
    stop: Option<DropGuard>,
}

impl TestDevice {
    async fn serve(dir: TempDir, identity: Identity) -> Self {
        let identity = Arc::new(identity);
        let state = Arc::new(PairedState::open(dir.path(), identity.device().clone()).unwrap());
        let server = ControlServer::bind(&identity, identity.advertise())
            .await
            .unwrap();
        let stop = CancellationToken::new();
        tokio::spawn(server.serve(router(state.clone()), stop.clone()));
        Self {
            client: ControlClient::new(&identity).unwrap(),
            address: PeerAddress {
                device: identity.device().clone(),
                addr: identity.advertise(),
            },
            dir,
            identity,
            state,
            stop: Some(stop.drop_guard()),
        }
    }

    async fn beat(&self, fleet: &Fleet, plans: Vec<PlanId>) -> HeartbeatAnswer {
        let heartbeat = Heartbeat {
            address: self.address.addr,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_seconds: 60,
            configuration: configuration(),
            utilisation: utilisation(),
            plans,
            compared: Default::default(),
        };
        self.client
            .post(&fleet.duplicator, "/v1/heartbeat", &heartbeat)
            .await
            .unwrap()
    }
}

fn configuration() -> Configuration {
    Configuration {
        cores: 4,
        memory: Bytes(8 << 30),
        storage: Bytes(100 << 30),
        nics: vec![Nic {
            name: "eth0".to_owned(),
            speed_mbits: Some(10_000),
        }],
        kernel: "6.18.0".to_owned(),
        architecture: "x86_64".to_owned(),
    }
}

fn utilisation() -> Utilisation {
    Utilisation {
        cpu_percent: 10.0,
        memory_percent: 20.0,
        memory_free: Bytes(6 << 30),
        disk_percent: 30.0,
        storage_free: Bytes(70 << 30),
        verdict: DeviceVerdict::Healthy,
        duties: 0,
        ports_taken: [22].into(),
        ipv4: true,
        ipv6: false,
    }
}
