//! The control channel's client: one request, one connection, one exact error.
//!
//! Invariants: it connects to an address but talks only to the device it means, whose name the
//! certificate must carry; every step has a time limit. No pooling: control calls are rare, and a fresh
//! handshake proves the peer anew.

use super::files::secret_json;
use super::identity::{Fingerprint, Identity};
use super::server::BODY_LIMIT;
use super::tls;
use crate::model::fleet::PeerAddress;
use crate::telemetry::links::{self, Sent};
use axum::http::{Method, Request, StatusCode, header};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use rustls::AlertDescription;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::error::Error as StdError;
use std::fmt;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use zeroize::Zeroize;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// A call on the control channel failed: to whom, for what, and how.
#[derive(Debug, thiserror::Error)]
#[error("{method} {path} to {to}: {failure}")]
pub struct CallError {
    /// The device that was meant.
    pub to: PeerAddress,
    /// HTTP method.
    pub method: Method,
    /// Path.
    pub path: String,
    /// How it failed.
    pub failure: CallFailure,
}

/// How a call failed.
#[derive(Debug, thiserror::Error)]
pub enum CallFailure {
    /// Nobody listens, or no route.
    #[error("cannot connect: {0}; is its agent running and its address right?")]
    Connect(std::io::Error),
    /// No connection in time.
    #[error("no connection within {0:?}; is the device up and reachable?")]
    ConnectTimeout(Duration),
    /// No answer in time; whether it was acted on is not known.
    #[error("no answer within {0:?}")]
    RequestTimeout(Duration),
    /// The certificate presented is not from this fleet's CA.
    #[error("its certificate is not from this fleet's CA ({0}); is it enrolled in another fleet?")]
    WrongCa(rustls::Error),
    /// The certificate is another device's.
    #[error("another device answers there ({0}); has its address changed?")]
    WrongDevice(rustls::Error),
    /// The right device and CA, but not the certificate that the duplicator named.
    #[error(
        "it has another certificate than the duplicator named; was it enrolled anew meanwhile?"
    )]
    OtherCertificate,
    /// It does not accept this device's certificate.
    #[error(
        "it refuses this device's certificate ({0:?}); was this device enrolled in another fleet?"
    )]
    Unwelcome(AlertDescription),
    /// Any other failure of TLS.
    #[error("TLS: {0}")]
    Tls(rustls::Error),
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Broken(String),
    /// It answered with an error.
    #[error("refused ({status}): {error}")]
    Answered {
        /// HTTP status.
        status: StatusCode,
        /// The error's text.
        error: String,
        /// The error's word, if it has one.
        code: Option<String>,
    },
    /// The answer, or our request, is not what the protocol says.
    #[error("answer not understood: {0}; do both sides run the same version?")]
    Malformed(String),
}

impl CallError {
    /// Whether the device itself said no: it did not do what it was asked.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self.failure, CallFailure::Answered { .. }) && !self.can_retry()
    }

    /// Whether the same call may succeed later, without anybody changing anything.
    #[must_use]
    pub fn can_retry(&self) -> bool {
        match &self.failure {
            CallFailure::Connect(_)
            | CallFailure::ConnectTimeout(_)
            | CallFailure::RequestTimeout(_)
            | CallFailure::Broken(_) => true,
            CallFailure::Answered { status, .. } => {
                // The last: the link was too slow for the request, just then.
                status.is_server_error()
                    || matches!(
                        *status,
                        StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT
                    )
            }
            CallFailure::WrongCa(_)
            | CallFailure::WrongDevice(_)
            | CallFailure::OtherCertificate
            | CallFailure::Unwelcome(_)
            | CallFailure::Tls(_)
            | CallFailure::Malformed(_) => false,
        }
    }

    /// Whether nobody was there, or went in the middle.
    #[must_use]
    pub fn is_away(&self) -> bool {
        matches!(
            self.failure,
            CallFailure::Connect(_) | CallFailure::ConnectTimeout(_) | CallFailure::Broken(_)
        )
    }

    /// The word by which the other side named its error.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        match &self.failure {
            CallFailure::Answered { code, .. } => code.as_deref(),
            _ => None,
        }
    }
}

/// Calls other devices as one identity. Cheap to clone.
#[derive(Clone)]
pub struct ControlClient {
    config: Arc<rustls::ClientConfig>,
    request_timeout: Duration,
    expected: Option<Fingerprint>,
}

impl fmt::Debug for ControlClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ControlClient")
    }
}

impl ControlClient {
    /// A client that presents `identity`.
    ///
    /// # Errors
    /// When the identity's key or certificate cannot be used for TLS.
    pub fn new(identity: &Identity) -> Result<Self, rustls::Error> {
        Ok(Self {
            config: tls::client(identity)?,
            request_timeout: REQUEST_TIMEOUT,
            expected: None,
        })
    }

    /// A client without identity, for enrolment: trusts the CA with this fingerprint.
    pub(super) fn enrolling(pin: Fingerprint) -> Result<Self, rustls::Error> {
        Ok(Self {
            config: tls::enrolling_client(pin)?,
            request_timeout: REQUEST_TIMEOUT,
            expected: None,
        })
    }

    /// The same client with another time limit from request to answer (default 30 s).
    #[must_use]
    pub fn with_timeout(mut self, request_timeout: Duration) -> Self {
        self.request_timeout = request_timeout;
        self
    }

    /// The same client, talking only to whoever has the certificate with this fingerprint.
    #[must_use]
    pub fn expecting(&self, certificate: Fingerprint) -> Self {
        Self {
            expected: Some(certificate),
            ..self.clone()
        }
    }

    /// POSTs `request` as JSON and returns the answer.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn post<Req: Serialize + ?Sized, Resp: DeserializeOwned>(
        &self,
        to: &PeerAddress,
        path: &str,
        request: &Req,
    ) -> Result<Resp, CallError> {
        let body = secret_json(request).map_err(|error| error.to_string());
        self.call(to, Method::POST, path, body.map(Bytes::from_owner))
            .await
    }

    /// GETs `path` and returns the answer.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn get<Resp: DeserializeOwned>(
        &self,
        to: &PeerAddress,
        path: &str,
    ) -> Result<Resp, CallError> {
        self.call(to, Method::GET, path, Ok(Bytes::new())).await
    }

    async fn call<Resp: DeserializeOwned>(
        &self,
        to: &PeerAddress,
        method: Method,
        path: &str,
        body: Result<Bytes, String>,
    ) -> Result<Resp, CallError> {
        let exchange = async {
            let body = body.map_err(CallFailure::Malformed)?;
            let connect = TcpStream::connect(to.addr);
            let stream = tokio::time::timeout(CONNECT_TIMEOUT, connect)
                .await
                .map_err(|_| CallFailure::ConnectTimeout(CONNECT_TIMEOUT))?
                .map_err(CallFailure::Connect)?;
            // A second handle, to ask the kernel about the connection when the call is over.
            let measured = stream.as_fd().try_clone_to_owned();
            let answer = self.exchange(stream, to, &method, path, body);
            let (status, body) = tokio::time::timeout(self.request_timeout, answer)
                .await
                .map_err(|_| CallFailure::RequestTimeout(self.request_timeout))??;
            if let Ok(socket) = measured {
                let device = Some(to.device.as_str());
                links::measure(to.addr.ip(), device, socket.as_fd(), &mut Sent::default());
            }
            let answer = understand(status, &body);
            // It may hold keys.
            if let Ok(mut body) = body.try_into_mut() {
                body.zeroize();
            }
            answer
        };
        exchange.await.map_err(|failure| CallError {
            to: to.clone(),
            method: method.clone(),
            path: path.to_owned(),
            failure,
        })
    }

    async fn exchange(
        &self,
        stream: TcpStream,
        to: &PeerAddress,
        method: &Method,
        path: &str,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), CallFailure> {
        let _ = stream.set_nodelay(true);
        let name = tls::server_name(&to.device).map_err(CallFailure::Tls)?;
        let host = name.to_str().into_owned();
        let stream = TlsConnector::from(self.config.clone())
            .connect(name, stream)
            .await
            .map_err(|error| broken(&error))?;
        let presented = stream.get_ref().1.peer_certificates();
        let presented = presented.and_then(|chain| chain.first().map(|der| Fingerprint::of(der)));
        if self.expected.is_some() && presented != self.expected {
            return Err(CallFailure::OtherCertificate);
        }
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| broken(&error))?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, host)
            .header(header::CONNECTION, "close")
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| CallFailure::Malformed(error.to_string()))?;
        let answer = async {
            let response = sender
                .send_request(request)
                .await
                .map_err(|error| broken(&error))?;
            let status = response.status();
            let body = Limited::new(response.into_body(), BODY_LIMIT)
                .collect()
                .await
                .map_err(|error| broken(error.as_ref()))?;
            Ok((status, body.to_bytes()))
        };
        tokio::pin!(answer);
        // In TLS 1.3 a server refuses a client's certificate after the client's handshake is over: the
        // alert arrives on the connection, and may make it end before the request does.
        tokio::select! {
            biased;
            answer = &mut answer => answer,
            ended = connection => match ended {
                Err(error) => Err(broken(&error)),
                Ok(()) => answer.await,
            },
        }
    }
}

fn understand<Resp: DeserializeOwned>(
    status: StatusCode,
    body: &[u8],
) -> Result<Resp, CallFailure> {
    #[derive(serde::Deserialize)]
    struct ErrorBody {
        error: String,
        code: Option<String>,
    }
    if status.is_success() {
        return serde_json::from_slice(body)
            .map_err(|error| CallFailure::Malformed(error.to_string()));
    }
    let (error, code) = match serde_json::from_slice::<ErrorBody>(body) {
        Ok(body) => (body.error, body.code),
        Err(_) => (String::from_utf8_lossy(body).trim().to_owned(), None),
    };
    Err(CallFailure::Answered {
        status,
        error,
        code,
    })
}

/// Finds what TLS said inside the errors of tokio and hyper.
fn broken(error: &(dyn StdError + 'static)) -> CallFailure {
    use rustls::CertificateError as Certificate;
    let Some(tls) = tls_cause(error) else {
        return CallFailure::Broken(innermost(error));
    };
    match tls {
        rustls::Error::InvalidCertificate(
            Certificate::NotValidForName | Certificate::NotValidForNameContext { .. },
        ) => CallFailure::WrongDevice(tls.clone()),
        rustls::Error::InvalidCertificate(_) => CallFailure::WrongCa(tls.clone()),
        rustls::Error::AlertReceived(
            alert @ (AlertDescription::UnknownCA
            | AlertDescription::CertificateRequired
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateExpired
            | AlertDescription::DecryptError
            | AlertDescription::AccessDenied),
        ) => CallFailure::Unwelcome(*alert),
        other => CallFailure::Tls(other.clone()),
    }
}

fn tls_cause<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a rustls::Error> {
    if let Some(tls) = error.downcast_ref::<rustls::Error>() {
        return Some(tls);
    }
    // An io::Error made from another error hides it from `source()`.
    if let Some(inner) = error
        .downcast_ref::<std::io::Error>()
        .and_then(std::io::Error::get_ref)
    {
        return tls_cause(inner);
    }
    tls_cause(error.source()?)
}

/// The innermost cause, which is the one that says something.
pub(super) fn innermost(error: &(dyn StdError + 'static)) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}
