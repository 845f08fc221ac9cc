//! The control channel's server: an accept loop over mutual TLS 1.3 in front of an `axum` router.
//!
//! Invariants: every request a router sees carries the verified [`PeerIdentity`] as extension; clients
//! without a certificate reach a separate router, or nothing; no peer, and no stranger, can hold up the
//! accept loop or use up the places of others.

use super::identity::{DUPLICATOR, Fingerprint, Identity, device_of};
use super::tls;
use crate::model::ids::DeviceId;
use crate::model::places::Places;
use axum::body::{Body, to_bytes};
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::StatusCode;
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json, Router};
use bytes::Bytes;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// The largest request or answer body on the control channel, in bytes; a plan with the descriptions of
/// a hundred containers is well below.
pub const BODY_LIMIT: usize = 8 << 20;
/// Time for a client to finish the handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for a client to send a request's header, and for an idle connection.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for a client without certificate, all in all.
const STRANGER_TIMEOUT: Duration = Duration::from_secs(10);
/// Handshakes and strangers at a time; whoever comes when they are taken takes the place of the oldest.
const HANDSHAKES: usize = 64;
/// Connections of fleet members at a time.
const CONNECTIONS: usize = 512;
/// Of these, connections of one: a target asks for the blocks of dozens of volumes at once.
pub(super) const CONNECTIONS_EACH: usize = 64;
/// Time for a member to send the body of a request.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Time for running requests to end after the server was told to stop.
const DRAIN: Duration = Duration::from_secs(5);

/// Who is at the other end, as the TLS handshake proved it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerIdentity {
    /// The device its certificate names.
    pub device: DeviceId,
    /// Whether it is the duplicator.
    pub is_duplicator: bool,
    /// Fingerprint of its certificate.
    pub certificate_fingerprint: Fingerprint,
}

impl PeerIdentity {
    /// Refuses everyone but the duplicator.
    ///
    /// # Errors
    /// 403.
    pub fn require_duplicator(&self) -> Result<(), ErrorAnswer> {
        if self.is_duplicator {
            Ok(())
        } else {
            Err(ErrorAnswer::new(
                StatusCode::FORBIDDEN,
                format!(
                    "only the duplicator may ask this, and this is {}",
                    self.device
                ),
            ))
        }
    }
}

/// An error as the control channel answers it: `{"error": …, "code": …}`.
#[derive(Debug)]
pub struct ErrorAnswer {
    status: StatusCode,
    error: String,
    code: Option<&'static str>,
}

impl ErrorAnswer {
    /// An answer with `status`; `error` says what failed and what to do.
    pub fn new(status: StatusCode, error: impl fmt::Display) -> Self {
        Self {
            status,
            error: error.to_string(),
            code: None,
        }
    }

    /// Adds a word by which a program can tell this error.
    #[must_use]
    pub fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }
}

impl IntoResponse for ErrorAnswer {
    fn into_response(self) -> Response {
        let body = serde_json::json!({ "error": self.error, "code": self.code });
        (self.status, Json(body)).into_response()
    }
}

/// The server could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address cannot be listened on.
    #[error(
        "cannot listen on {address} for the control channel: {error}; stop what uses it, or choose another port: `listen` of a duplicator, a device's by `lifeboat fleet join --advertise`"
    )]
    Listen {
        /// Address.
        address: SocketAddr,
        /// Cause.
        error: std::io::Error,
    },
    /// The identity does not make a TLS server.
    #[error("cannot use this device's identity for TLS: {0}; enrol the device anew")]
    Tls(rustls::Error),
}

/// A bound control channel that does not serve yet.
pub struct ControlServer {
    listener: TcpListener,
    address: SocketAddr,
    members_only: TlsAcceptor,
    strangers_too: TlsAcceptor,
}

impl ControlServer {
    /// Binds `listen`.
    ///
    /// # Errors
    /// [`ServeError`].
    pub async fn bind(identity: &Identity, listen: SocketAddr) -> Result<Self, ServeError> {
        let bound = async {
            let listener = TcpListener::bind(listen).await?;
            let address = listener.local_addr()?;
            Ok((listener, address))
        };
        let (listener, address) = bound.await.map_err(|error| ServeError::Listen {
            address: listen,
            error,
        })?;
        Ok(Self {
            listener,
            address,
            members_only: tls::server(identity, false)
                .map_err(ServeError::Tls)?
                .into(),
            strangers_too: tls::server(identity, true).map_err(ServeError::Tls)?.into(),
        })
    }

    /// The bound address.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Serves fleet members until `stop`.
    pub async fn serve(self, members: Router, stop: CancellationToken) {
        self.run(members, None, stop).await;
    }

    /// Serves fleet members, and `strangers` to clients without a certificate, until `stop`.
    pub async fn serve_enrolling(
        self,
        members: Router,
        strangers: Router,
        stop: CancellationToken,
    ) {
        self.run(members, Some(strangers), stop).await;
    }

    async fn run(self, members: Router, strangers: Option<Router>, stop: CancellationToken) {
        let limit = DefaultBodyLimit::max(BODY_LIMIT);
        let shared = Arc::new(Shared {
            acceptor: if strangers.is_some() {
                self.strangers_too
            } else {
                self.members_only
            },
            members: members.layer(from_fn(received)).layer(limit),
            strangers: strangers.map(|router| router.layer(limit)),
            connections: Semaphore::new(CONNECTIONS),
            connected: Mutex::default(),
            stop: stop.clone(),
        });
        let handshakes = Arc::new(Mutex::new(Places::new(HANDSHAKES)));
        let tasks = TaskTracker::new();
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => break,
                accepted = self.listener.accept() => accepted,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Usually EMFILE: others must end before the next one can begin.
                    tracing::warn!(%error, "control channel: cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let place = Place::take(&handshakes, address.ip());
            let shared = shared.clone();
            tasks.spawn(async move {
                if let Err(reason) = shared.connection(stream, place).await {
                    tracing::warn!(%address, %reason, "control channel: connection refused or broken");
                }
            });
        }
        // New peers shall be told at once that nobody is here, not wait for the old ones to be served.
        drop(self.listener);
        tasks.close();
        if tokio::time::timeout(DRAIN, tasks.wait()).await.is_err() {
            tracing::warn!("control channel: requests were still running {DRAIN:?} after the stop");
        }
    }
}

/// Peers under way to a certificate, and how to send one away.
type Handshakes = Arc<Mutex<Places<CancellationToken>>>;

/// One of the places of those; given back when it is dropped.
struct Place {
    all: Handshakes,
    number: u64,
    sent_away: CancellationToken,
}

impl Place {
    fn take(all: &Handshakes, from: IpAddr) -> Self {
        let sent_away = CancellationToken::new();
        let (number, oldest) = lock(all).take(from, sent_away.clone());
        if let Some(oldest) = oldest {
            oldest.cancel();
        }
        Self {
            all: all.clone(),
            number,
            sent_away,
        }
    }

    /// What comes of `work`, unless it takes longer than `limit` or the place is needed.
    async fn within<T>(
        &self,
        limit: Duration,
        work: impl Future<Output = T>,
        what: &str,
    ) -> Result<T, String> {
        tokio::select! {
            done = tokio::time::timeout(limit, work) => {
                done.map_err(|_| format!("no {what} within {limit:?}"))
            }
            () = self.sent_away.cancelled() => {
                Err(format!("no {what} yet, and its place was needed for another"))
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        lock(&self.all).leave(self.number);
    }
}

fn lock(all: &Handshakes) -> std::sync::MutexGuard<'_, Places<CancellationToken>> {
    // Whole after every statement; a panic elsewhere spoils nothing.
    all.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Shared {
    acceptor: TlsAcceptor,
    members: Router,
    strangers: Option<Router>,
    connections: Semaphore,
    /// How many each member has.
    connected: Mutex<HashMap<DeviceId, usize>>,
    stop: CancellationToken,
}

/// One of the connections of a member; it ends when this is dropped.
struct Connected<'a> {
    all: &'a Mutex<HashMap<DeviceId, usize>>,
    device: DeviceId,
}

impl<'a> Connected<'a> {
    fn take(all: &'a Mutex<HashMap<DeviceId, usize>>, device: &DeviceId) -> Option<Self> {
        let mut counts = all.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(device.clone()).or_default();
        if *count == CONNECTIONS_EACH {
            return None;
        }
        *count += 1;
        let device = device.clone();
        Some(Self { all, device })
    }
}

impl Drop for Connected<'_> {
    fn drop(&mut self) {
        let mut counts = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.device) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.device);
            }
        }
    }
}

/// Takes a request whole before it is answered, so that nobody holds its place by sending it slowly.
async fn received(request: Request, next: Next) -> Response {
    let (head, body) = request.into_parts();
    match body_within(BODY_TIMEOUT, body).await {
        Ok(body) => next.run(Request::from_parts(head, body.into())).await,
        Err(refused) => refused.into_response(),
    }
}

async fn body_within(limit: Duration, body: Body) -> Result<Bytes, ErrorAnswer> {
    let read = tokio::time::timeout(limit, to_bytes(body, BODY_LIMIT)).await;
    let read = read.map_err(|_| {
        let why = format!("the request did not come within {limit:?}");
        ErrorAnswer::new(StatusCode::REQUEST_TIMEOUT, why)
    })?;
    // Who broke off hears nothing.
    read.map_err(|error| ErrorAnswer::new(StatusCode::PAYLOAD_TOO_LARGE, error))
}

impl Shared {
    async fn connection(&self, stream: TcpStream, place: Place) -> Result<(), String> {
        let _ = stream.set_nodelay(true);
        let handshake = self.acceptor.accept(stream);
        let stream = place
            .within(HANDSHAKE_TIMEOUT, handshake, "TLS handshake")
            .await?
            .map_err(|error| format!("TLS handshake failed: {error}"))?;
        let certificate = stream
            .get_ref()
            .1
            .peer_certificates()
            .and_then(|chain| chain.first())
            .cloned();
        match (certificate, &self.strangers) {
            (Some(certificate), _) => {
                let device = device_of(&certificate).map_err(|error| error.to_string())?;
                let peer = PeerIdentity {
                    is_duplicator: device.as_str() == DUPLICATOR,
                    certificate_fingerprint: Fingerprint::of(&certificate),
                    device,
                };
                drop(place);
                let _own = Connected::take(&self.connected, &peer.device).ok_or_else(|| {
                    format!(
                        "{} refused, it has {CONNECTIONS_EACH} connections open",
                        peer.device
                    )
                })?;
                let _place = self.connections.try_acquire().map_err(|_| {
                    format!(
                        "{} refused, {CONNECTIONS} connections are open",
                        peer.device
                    )
                })?;
                self.http(stream, self.members.clone().layer(Extension(peer)))
                    .await
            }
            (None, Some(strangers)) => {
                // Keeps its handshake place: strangers compete among themselves only.
                let served = self.http(stream, strangers.clone());
                let what = "certificate, and no end";
                place.within(STRANGER_TIMEOUT, served, what).await?
            }
            (None, None) => Err("no certificate presented".to_owned()),
        }
    }

    async fn http(&self, stream: TlsStream<TcpStream>, router: Router) -> Result<(), String> {
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
        tokio::pin!(connection);
        let served = tokio::select! {
            served = connection.as_mut() => served,
            () = self.stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        match served {
            Ok(()) => Ok(()),
            // A peer that goes away between requests, or idles past the limit, is nothing to report.
            Err(error) if error.is_incomplete_message() || error.is_timeout() => Ok(()),
            Err(error) => Err(super::client::innermost(&error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::body::Frame;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    /// The body of who sends nothing more.
    struct Never;

    impl hyper::body::Body for Never {
        type Data = Bytes;
        type Error = std::io::Error;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
            Poll::Pending
        }
    }

    #[tokio::test]
    async fn a_request_whose_body_does_not_come_is_refused() {
        let limit = Duration::from_millis(10);
        let refused = body_within(limit, Body::new(Never)).await.unwrap_err();
        assert_eq!(refused.status, StatusCode::REQUEST_TIMEOUT);
        let long = Duration::from_secs(60);
        let body = body_within(long, Body::from("{}")).await.unwrap();
        assert_eq!(body, "{}");
        let much = Body::from(vec![b' '; BODY_LIMIT + 1]);
        let refused = body_within(long, much).await.unwrap_err();
        assert_eq!(refused.status, StatusCode::PAYLOAD_TOO_LARGE);
    }
}
