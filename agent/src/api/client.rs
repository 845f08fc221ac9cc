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
    /// It takes the request and does nothing.
    #[error(
        "the agent on {socket} has not answered for {} s: it is stopped or hangs; look whether its process is stopped \
         (state T: `kill -CONT`) or waits for a disk, and at its log; what was asked it may still do when it goes on",
        after.as_secs()
    )]
    Silent {
        /// Socket.
        socket: PathBuf,
        /// For how long it was waited for.
        after: Duration,
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

/// Between two looks whether an agent that works on an answer lives.
const LOOK: Duration = Duration::from_secs(2);
/// An agent that lives answers such a look sooner, also on a sick host: a disk that is given up after the 30 s of
/// Linux's SCSI timeout (`/sys/block/*/device/timeout`) may keep its threads for that long.
const PATIENCE: Duration = Duration::from_secs(45);

/// A client of the agent on one socket. It waits for an answer for as long as the agent lives.
pub struct Client {
    socket: PathBuf,
    http: reqwest::Client,
    patience: Duration,
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
            .build()?;
        Ok(Self {
            socket: socket.to_owned(),
            http,
            patience: PATIENCE,
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
        tokio::select! {
            answer = self.whole_answer(request) => answer,
            error = self.silence() => Err(error),
        }
    }

    /// Ends when the agent does not answer at all any more, whatever it works on.
    async fn silence(&self) -> ClientError {
        loop {
            tokio::time::sleep(LOOK.min(self.patience)).await;
            let look = self.http.get(url("/v1/alive")).timeout(self.patience);
            match look.send().await {
                Err(error) if error.is_timeout() => {
                    return ClientError::Silent {
                        socket: self.socket.clone(),
                        after: self.patience,
                    };
                }
                // That it is gone the request hears, too; and any answer is one.
                _ => {}
            }
        }
    }

    async fn whole_answer<T: DeserializeOwned>(
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

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::get;
    use axum::{Json, Router};
    use std::sync::Arc;
    use tokio::net::UnixListener;
    use tokio::sync::Notify;

    fn client(directory: &tempfile::TempDir) -> (Client, UnixListener) {
        let socket = directory.path().join("agent.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let patience = Duration::from_millis(200);
        let client = Client::new(&socket).unwrap();
        (Client { patience, ..client }, listener)
    }

    #[tokio::test]
    async fn an_agent_that_takes_requests_and_answers_none_is_told_of() {
        let directory = tempfile::tempdir().unwrap();
        let (client, listener) = client(&directory);
        let asked = client.get::<()>("/v1/status");
        let asked = tokio::time::timeout(Duration::from_secs(30), asked);
        let error = asked.await.expect("it waits for ever").unwrap_err();
        assert!(matches!(error, ClientError::Silent { .. }), "{error}");
        assert!(error.to_string().contains("agent.sock"), "{error}");
        drop(listener);
    }

    #[tokio::test]
    async fn an_answer_is_waited_for_as_long_as_the_agent_lives() {
        let directory = tempfile::tempdir().unwrap();
        let (client, listener) = client(&directory);
        let looks = Arc::new(Notify::new());
        let (looked, is_over) = (looks.clone(), looks.clone());
        let alive = async move || {
            looked.notify_one();
            Json(())
        };
        let verify = async move || {
            // Longer than it would be waited for in silence.
            for _ in 0..4 {
                is_over.notified().await;
            }
            Json(7)
        };
        let routes = Router::new()
            .route("/v1/alive", get(alive))
            .route("/v1/verify", get(verify));
        tokio::spawn(async move { axum::serve(listener, routes).await });
        let asked = client.get::<u32>("/v1/verify");
        let asked = tokio::time::timeout(Duration::from_secs(30), asked);
        assert_eq!(asked.await.expect("it is looked at").unwrap(), 7);
    }
}
