//! HTTP over a runtime's unix socket: one connection a request, JSON in and out.
//!
//! Invariants: every error names the socket, what was being done, and what the runtime answered; every
//! wait is bounded; an answer larger than [`MAX_ANSWER`] is refused before it is held in memory.

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, TryStreamExt as _};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::OnceCell;

/// Version of the Docker API that Docker 20.10 and Podman 4 and 5 all serve.
const API: &str = "/v1.41";
/// Version of Podman's own API, used only where the compatible one lacks the call.
const LIBPOD: &str = "/v4.0.0/libpod";
/// Largest JSON answer taken: an inspect is about 10 kB, a list of 1,000 containers about 2 MB.
const MAX_ANSWER: usize = 64 << 20;
/// How long a question may take before the runtime counts as hanging.
const ASK: Duration = Duration::from_secs(15);
/// How long a change may take: stopping, creating and removing wait for processes and disks.
const CHANGE: Duration = Duration::from_secs(120);
/// How long a stream may stay silent before it counts as broken.
const STALL: Duration = Duration::from_secs(60);

/// A request to a container runtime failed.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// Nobody answers on the socket.
    #[error(
        "cannot {operation}: no runtime answers at {}: {source}; start it (dockerd, or `podman system service`) or correct `runtimes` in the agent's configuration",
        socket.display()
    )]
    Unreachable {
        /// The runtime's socket.
        socket: PathBuf,
        /// What was being done.
        operation: String,
        /// Why the connection failed.
        source: io::Error,
    },
    /// The runtime said no.
    #[error("cannot {operation}: the runtime at {} answered {status}: {message}", socket.display())]
    Refused {
        /// The runtime's socket.
        socket: PathBuf,
        /// What was being done.
        operation: String,
        /// HTTP status.
        status: u16,
        /// The runtime's own words.
        message: String,
    },
    /// No answer in time.
    #[error(
        "cannot {operation}: the runtime at {} did not answer within {after:?}; see whether it hangs on a disk or a network",
        socket.display()
    )]
    Timeout {
        /// The runtime's socket.
        socket: PathBuf,
        /// What was being done.
        operation: String,
        /// The bound that passed.
        after: Duration,
    },
    /// The answer is not what the API promises, or the connection broke while it came.
    #[error("cannot {operation}: the answer of the runtime at {} is unusable: {reason}", socket.display())]
    Answer {
        /// The runtime's socket.
        socket: PathBuf,
        /// What was being done.
        operation: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl RuntimeError {
    /// Whether the same request can succeed later without anybody changing anything.
    #[must_use]
    pub fn retry_helps(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Timeout { .. } => true,
            Self::Refused { status, .. } => matches!(status, 429 | 503),
            Self::Answer { .. } => false,
        }
    }

    /// Whether the runtime knows no such object.
    #[must_use]
    pub fn not_found(&self) -> bool {
        matches!(self, Self::Refused { status: 404, .. })
    }
}

/// A runtime's version, `major.minor.patch`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32, pub u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

impl Version {
    /// The first three numbers of a version text; missing ones are 0 (`5.4.2-rc1`, `20.10.24+dfsg1`).
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut numbers = text.split(['.', '-', '+']).map(|part| {
            let digits: String = part.chars().take_while(char::is_ascii_digit).collect();
            digits.parse().unwrap_or(0)
        });
        let mut next = || numbers.next().unwrap_or(0);
        Self(next(), next(), next())
    }
}

/// What answers at a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// Docker.
    Docker(Version),
    /// Podman.
    Podman(Version),
}

impl Engine {
    pub(super) fn is_podman(self) -> bool {
        matches!(self, Self::Podman(_))
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Docker(version) => write!(f, "Docker {version}"),
            Self::Podman(version) => write!(f, "Podman {version}"),
        }
    }
}

/// One container runtime, by its socket.
#[derive(Debug)]
pub struct Runtime {
    socket: PathBuf,
    engine: OnceCell<Engine>,
}

type Body = UnsyncBoxBody<Bytes, io::Error>;

impl Runtime {
    /// The runtime at a socket, `/run/podman/podman.sock` or `unix:///run/docker.sock`. Does no I/O.
    #[must_use]
    pub fn new(socket: &str) -> Self {
        Self {
            socket: PathBuf::from(socket.strip_prefix("unix://").unwrap_or(socket)),
            engine: OnceCell::new(),
        }
    }

    /// Path of the socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Whether the runtime answers now.
    ///
    /// # Errors
    /// It does not.
    pub async fn answers(&self) -> Result<(), RuntimeError> {
        self.get::<Value>("/version", "ask for the version")
            .await
            .map(|_| ())
    }

    /// Which engine answers; asked once.
    ///
    /// # Errors
    /// When the runtime does not answer.
    pub async fn engine(&self) -> Result<Engine, RuntimeError> {
        self.engine
            .get_or_try_init(|| async {
                let answer: Value = self.get("/version", "ask for the version").await?;
                let version = Version::parse(answer["Version"].as_str().unwrap_or_default());
                // Docker names its main component `Engine`, Podman `Podman Engine`.
                let podman = answer["Components"].as_array().is_some_and(|components| {
                    components
                        .iter()
                        .any(|part| part["Name"].as_str().is_some_and(|n| n.contains("Podman")))
                });
                Ok(if podman {
                    Engine::Podman(version)
                } else {
                    Engine::Docker(version)
                })
            })
            .await
            .copied()
    }

    /// Directory under which the files of the runtime's own mount namespace are found: `/`, unless it
    /// runs in another one than we do. Paths the runtime tells are below it.
    ///
    /// # Errors
    /// When the runtime does not answer.
    pub(super) async fn root(&self, operation: &str) -> Result<PathBuf, RuntimeError> {
        let unreachable = |source| RuntimeError::Unreachable {
            socket: self.socket.clone(),
            operation: operation.to_owned(),
            source,
        };
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(unreachable)?;
        let peer = stream.peer_cred().map_err(unreachable)?.pid();
        let namespace = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/mnt")).ok();
        Ok(match peer.map(|pid| pid.to_string()) {
            Some(pid) if namespace(&pid).is_some() && namespace(&pid) != namespace("self") => {
                PathBuf::from(format!("/proc/{pid}/root"))
            }
            _ => PathBuf::from("/"),
        })
    }

    pub(super) async fn get<T: DeserializeOwned>(
        &self,
        path: &str,
        operation: &str,
    ) -> Result<T, RuntimeError> {
        let uri = format!("{API}{path}");
        let (_, bytes) = self.call(Method::GET, &uri, None, operation, ASK).await?;
        self.parse(&bytes, operation)
    }

    pub(super) async fn get_libpod<T: DeserializeOwned>(
        &self,
        path: &str,
        operation: &str,
    ) -> Result<T, RuntimeError> {
        let uri = format!("{LIBPOD}{path}");
        let (_, bytes) = self
            .call(Method::GET, &uri, None, operation, CHANGE)
            .await?;
        self.parse(&bytes, operation)
    }

    /// POST with an optional JSON body; the answer may be empty (`Null`).
    pub(super) async fn post(
        &self,
        path: &str,
        body: Option<&Value>,
        operation: &str,
    ) -> Result<Value, RuntimeError> {
        let (_, bytes) = self
            .call(
                Method::POST,
                &format!("{API}{path}"),
                body,
                operation,
                CHANGE,
            )
            .await?;
        if bytes.is_empty() {
            return Ok(Value::Null);
        }
        self.parse(&bytes, operation)
    }

    pub(super) async fn delete(&self, path: &str, operation: &str) -> Result<(), RuntimeError> {
        self.call(
            Method::DELETE,
            &format!("{API}{path}"),
            None,
            operation,
            CHANGE,
        )
        .await
        .map(|_| ())
    }

    /// A short answer as it came, not JSON (container logs).
    pub(super) async fn get_bytes(
        &self,
        path: &str,
        operation: &str,
    ) -> Result<Bytes, RuntimeError> {
        self.call(Method::GET, &format!("{API}{path}"), None, operation, ASK)
            .await
            .map(|(_, bytes)| bytes)
    }

    /// The answer's body as it comes; each piece within the stall bound.
    pub(super) async fn stream(
        &self,
        path: &str,
        operation: &str,
    ) -> Result<impl Stream<Item = Result<Bytes, RuntimeError>> + Send + use<>, RuntimeError> {
        let request = self.request(
            Method::GET,
            &format!("{API}{path}"),
            empty(),
            None,
            operation,
        )?;
        let response = self.bounded(ASK, operation, self.send(request, operation));
        let response = self.check(response.await?, operation).await?;
        let (socket, operation) = (self.socket.clone(), operation.to_owned());
        let body = response.into_body().into_data_stream();
        Ok(futures_util::stream::unfold(Some(body), move |body| {
            let (socket, operation) = (socket.clone(), operation.clone());
            async move {
                let mut body = body?;
                match tokio::time::timeout(STALL, body.next()).await {
                    Ok(None) => None,
                    Ok(Some(Ok(bytes))) => Some((Ok(bytes), Some(body))),
                    Ok(Some(Err(error))) => {
                        let reason = format!("the connection broke: {error}");
                        let error = RuntimeError::Answer {
                            socket,
                            operation,
                            reason,
                        };
                        Some((Err(error), None))
                    }
                    Err(_) => {
                        let error = RuntimeError::Timeout {
                            socket,
                            operation,
                            after: STALL,
                        };
                        Some((Err(error), None))
                    }
                }
            }
        }))
    }

    /// An answer without end, as it comes. Podman sends even its head with the first piece only: when this
    /// returns, the question is on its way and nothing is known of the answer.
    pub(super) async fn endless(
        &self,
        path: &str,
        operation: &str,
    ) -> Result<impl Stream<Item = Result<Bytes, RuntimeError>> + Send + use<>, RuntimeError> {
        let uri = format!("{API}{path}");
        let request = self.request(Method::GET, &uri, empty(), None, operation)?;
        let response = self.begin(request, operation).await?;
        let (socket, operation) = (self.socket.clone(), operation.to_owned());
        Ok(futures_util::stream::once(async move {
            let runtime = Self {
                socket,
                engine: OnceCell::new(),
            };
            let response = runtime.check(response.await?, &operation).await?;
            let pieces = response.into_body().into_data_stream();
            Ok(pieces.map_err(move |error| {
                runtime.unusable(&operation, format!("the connection broke: {error}"))
            }))
        })
        .try_flatten())
    }

    /// POST of a stream, such as an image archive; the answer is JSON lines, returned as text.
    pub(super) async fn upload(
        &self,
        path: &str,
        content: impl Stream<Item = io::Result<Bytes>> + Send + 'static,
        operation: &str,
    ) -> Result<String, RuntimeError> {
        let body = StreamBody::new(content.map(|piece| piece.map(Frame::data))).boxed_unsync();
        let request = self.request(
            Method::POST,
            &format!("{API}{path}"),
            body,
            Some("application/x-tar"),
            operation,
        )?;
        // No bound on the whole: its length is the data's, and a dead runtime closes the socket.
        let response = self.send(request, operation).await?;
        let response = self.check(response, operation).await?;
        let bytes = self.collect(response.into_body(), operation).await?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    async fn call(
        &self,
        method: Method,
        uri: &str,
        body: Option<&Value>,
        operation: &str,
        bound: Duration,
    ) -> Result<(StatusCode, Bytes), RuntimeError> {
        let (content, kind) = match body {
            Some(json) => (full(json.to_string()), Some("application/json")),
            None => (empty(), None),
        };
        let request = self.request(method, uri, content, kind, operation)?;
        self.bounded(bound, operation, async {
            let response = self.send(request, operation).await?;
            let response = self.check(response, operation).await?;
            let status = response.status();
            let bytes = self.collect(response.into_body(), operation).await?;
            Ok((status, bytes))
        })
        .await
    }

    async fn bounded<T>(
        &self,
        bound: Duration,
        operation: &str,
        work: impl Future<Output = Result<T, RuntimeError>>,
    ) -> Result<T, RuntimeError> {
        match tokio::time::timeout(bound, work).await {
            Ok(result) => result,
            Err(_) => Err(RuntimeError::Timeout {
                socket: self.socket.clone(),
                operation: operation.to_owned(),
                after: bound,
            }),
        }
    }

    fn request(
        &self,
        method: Method,
        uri: &str,
        body: Body,
        content_type: Option<&str>,
        operation: &str,
    ) -> Result<Request<Body>, RuntimeError> {
        let mut request = Request::builder().method(method).uri(uri);
        request = request.header("host", "localhost");
        if let Some(kind) = content_type {
            request = request.header("content-type", kind);
        }
        request
            .body(body)
            .map_err(|error| self.unusable(operation, format!("bad request {uri}: {error}")))
    }

    async fn send(
        &self,
        request: Request<Body>,
        operation: &str,
    ) -> Result<Response<Incoming>, RuntimeError> {
        self.begin(request, operation).await?.await
    }

    /// Sends a request; the returned future waits for the head of its answer.
    async fn begin(
        &self,
        request: Request<Body>,
        operation: &str,
    ) -> Result<
        impl Future<Output = Result<Response<Incoming>, RuntimeError>> + Send + use<>,
        RuntimeError,
    > {
        let unreachable = |source| RuntimeError::Unreachable {
            socket: self.socket.clone(),
            operation: operation.to_owned(),
            source,
        };
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(unreachable)?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.unusable(operation, error.to_string()))?;
        // Ends by itself when the answer's body is dropped or complete.
        tokio::spawn(connection);
        let response = sender.send_request(request);
        let (socket, operation) = (self.socket.clone(), operation.to_owned());
        Ok(async move {
            response.await.map_err(|error| RuntimeError::Answer {
                socket,
                operation,
                reason: format!("the connection broke: {error}"),
            })
        })
    }

    /// Passes 2xx and 304 (already so); turns everything else into the runtime's own words.
    async fn check(
        &self,
        response: Response<Incoming>,
        operation: &str,
    ) -> Result<Response<Incoming>, RuntimeError> {
        let status = response.status();
        if status.is_success() || status == StatusCode::NOT_MODIFIED {
            return Ok(response);
        }
        let bytes = self.collect(response.into_body(), operation).await?;
        Err(RuntimeError::Refused {
            socket: self.socket.clone(),
            operation: operation.to_owned(),
            status: status.as_u16(),
            message: error_message(&bytes),
        })
    }

    async fn collect(&self, body: Incoming, operation: &str) -> Result<Bytes, RuntimeError> {
        Limited::new(body, MAX_ANSWER)
            .collect()
            .await
            .map(http_body_util::Collected::to_bytes)
            .map_err(|error| self.unusable(operation, error.to_string()))
    }

    fn parse<T: DeserializeOwned>(&self, bytes: &[u8], operation: &str) -> Result<T, RuntimeError> {
        serde_json::from_slice(bytes).map_err(|error| self.unusable(operation, error.to_string()))
    }

    pub(super) fn unusable(&self, operation: &str, reason: String) -> RuntimeError {
        RuntimeError::Answer {
            socket: self.socket.clone(),
            operation: operation.to_owned(),
            reason,
        }
    }
}

fn full(text: String) -> Body {
    Full::from(text)
        .map_err(|never| match never {})
        .boxed_unsync()
}

fn empty() -> Body {
    full(String::new())
}

/// The `message` of the runtime's error object, else the text itself.
fn error_message(bytes: &[u8]) -> String {
    let object: Option<Value> = serde_json::from_slice(bytes).ok();
    object
        .as_ref()
        .and_then(|object| object["message"].as_str())
        .map_or_else(
            || String::from_utf8_lossy(bytes).trim().to_owned(),
            str::to_owned,
        )
}

/// Escapes a name for a path segment or query value of a URI (RFC 3986 unreserved characters stay).
pub(super) fn escape(name: &str) -> String {
    use std::fmt::Write as _;
    name.bytes().fold(String::new(), |mut text, byte| {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                text.push(byte as char);
            }
            _ => {
                let _ = write!(text, "%{byte:02X}");
            }
        }
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_both_engines_are_read_and_ordered() {
        assert_eq!(Version::parse("20.10.24+dfsg1"), Version(20, 10, 24));
        assert_eq!(Version::parse("5.1.0-rc1"), Version(5, 1, 0));
        assert_eq!(Version::parse("4.9"), Version(4, 9, 0));
        assert!(Version::parse("4.3.1") < Version(5, 1, 0));
    }

    #[test]
    fn the_runtimes_own_words_are_taken_from_both_kinds_of_error_object() {
        let podman =
            br#"{"cause":"no such container","message":"no container with name x","response":404}"#;
        assert_eq!(error_message(podman), "no container with name x");
        assert_eq!(error_message(b"404 page not found\n"), "404 page not found");
    }

    #[test]
    fn names_are_escaped_for_uris() {
        assert_eq!(escape("localhost/bb:1"), "localhost%2Fbb%3A1");
        assert_eq!(escape("a-b_c.d~1"), "a-b_c.d~1");
    }

    #[tokio::test]
    async fn a_runtime_that_is_not_there_is_named_with_the_next_step() {
        let runtime = Runtime::new("unix:///nonexistent/p.sock");
        let error = runtime.engine().await.unwrap_err();
        assert!(error.retry_helps());
        let text = error.to_string();
        assert!(
            text.contains("/nonexistent/p.sock") && text.contains("podman system service"),
            "{text}"
        );
    }
}
