//! The command line's side of the local API.

use super::local::{Because, Refusal};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Why the agent did not answer with what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The socket is another user's.
    #[error("the agent's socket {socket} is for its own user: ask as root (`sudo lifeboat …`)")]
    Denied {
        /// Socket.
        socket: PathBuf,
    },
    /// Nobody answers on the socket.
    #[error(
        "no agent answers on {socket}: {error}; start it with `lifeboat agent --config FILE`, or name its socket with --socket"
    )]
    Unreachable {
        /// Socket.
        socket: PathBuf,
        /// Cause.
        error: String,
    },
    /// It refused.
    #[error("{0}")]
    Refused(String),
    /// The plan stands in the way.
    #[error("{0}")]
    Blocked(String),
    /// A device that it asked cannot be reached.
    #[error("{0}")]
    Device(String),
    /// It answered something else.
    #[error(
        "the agent on {socket} answered something unexpected: {error}; are agent and command line of the same version?"
    )]
    Garbled {
        /// Socket.
        socket: PathBuf,
        /// Cause.
        error: reqwest::Error,
    },
}

/// A client of the agent on one socket.
pub struct Client {
    socket: PathBuf,
    http: reqwest::Client,
}

impl Client {
    /// A client; it connects with each request.
    ///
    /// # Errors
    /// The HTTP client cannot be built.
    pub fn new(socket: &Path) -> Result<Self, reqwest::Error> {
        // Nothing here speaks TLS, but the client wants a provider to be there.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let http = reqwest::Client::builder()
            .unix_socket(socket)
            // A host without certificate authorities has an agent too.
            .tls_certs_only([])
            .timeout(Duration::from_secs(600))
            .build()?;
        Ok(Self {
            socket: socket.to_owned(),
            http,
        })
    }

    /// GET `path`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.answer(self.http.get(url(path))).await
    }

    /// POST `body` to `path`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.answer(self.http.post(url(path)).json(body)).await
    }

    fn unreachable(&self, error: &reqwest::Error) -> ClientError {
        let socket = self.socket.clone();
        // What the system said is the last of the causes.
        let mut cause: &dyn Error = error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        let io = cause.downcast_ref::<std::io::Error>();
        if io.is_some_and(|error| error.kind() == std::io::ErrorKind::PermissionDenied) {
            return ClientError::Denied { socket };
        }
        let error = cause.to_string();
        ClientError::Unreachable { socket, error }
    }

    async fn answer<T: DeserializeOwned>(
        &self,
        request: reqwest::RequestBuilder,
    ) -> Result<T, ClientError> {
        let garbled = |error| ClientError::Garbled {
            socket: self.socket.clone(),
            error,
        };
        let response = request
            .send()
            .await
            .map_err(|error| self.unreachable(&error))?;
        if response.status().is_success() {
            return response.json().await.map_err(garbled);
        }
        let refusal: Refusal = response.json().await.map_err(garbled)?;
        Err(match refusal.because {
            Because::Plan => ClientError::Blocked(refusal.error),
            Because::Device => ClientError::Device(refusal.error),
            Because::Other => ClientError::Refused(refusal.error),
        })
    }
}

fn url(path: &str) -> String {
    format!("http://agent{path}")
}
