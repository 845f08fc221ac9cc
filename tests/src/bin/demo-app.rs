//! The demo's service: `POST /write {"id","payload"}` stores in PostgreSQL and Redis and answers 200 only
//! when both have acknowledged; `GET /health` asks both.
//!
//! A few long-lived connections; a request whose connection fails drops it and answers 503, and the next
//! request connects again. Non-goal: atomicity between the two databases.

use std::env;
use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Deserialize;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Mutex;
use tokio::time::timeout;

/// Connections to each database.
const POOL: usize = 4;

/// How long a database may take before the client is told to try again.
const PATIENCE: Duration = Duration::from_secs(4);

#[derive(Deserialize)]
struct Write {
    id: String,
    payload: String,
}

struct Service {
    db: String,
    cache: String,
    slots: [Mutex<Option<Connections>>; POOL],
    next: AtomicUsize,
}

struct Connections {
    db: tokio_postgres::Client,
    cache: BufStream<TcpStream>,
}

impl Connections {
    async fn open(service: &Service) -> Result<Self> {
        let (host, port) = service.db.split_once(':').context("DB is host:port")?;
        let (db, connection) = tokio_postgres::Config::new()
            .host(host)
            .port(port.parse().context("port in DB")?)
            .user("postgres")
            .connect(tokio_postgres::NoTls)
            .await
            .context("PostgreSQL")?;
        // Ends when the client is dropped; its error is the client's next error.
        tokio::spawn(connection);
        // Under a lock: two first requests at once would race for the table's name.
        db.batch_execute(
            "SELECT pg_advisory_lock(1);
             CREATE TABLE IF NOT EXISTS writes (id text PRIMARY KEY, payload text NOT NULL);
             SELECT pg_advisory_unlock(1);",
        )
        .await?;
        let stream = TcpStream::connect(&service.cache).await.context("Redis")?;
        stream.set_nodelay(true)?;
        Ok(Self {
            db,
            cache: BufStream::new(stream),
        })
    }

    async fn write(&mut self, write: &Write) -> Result<()> {
        self.db
            .execute(
                "INSERT INTO writes (id, payload) VALUES ($1, $2)",
                &[&write.id, &write.payload],
            )
            .await?;
        let key = format!("write:{}", write.id);
        self.redis(&["SET", &key, &write.payload]).await
    }

    async fn health(&mut self) -> Result<()> {
        self.db.batch_execute("SELECT 1").await?;
        self.redis(&["PING"]).await
    }

    /// One command of Redis's protocol whose answer is a simple string.
    async fn redis(&mut self, words: &[&str]) -> Result<()> {
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request.push_str(&format!("${}\r\n{word}\r\n", word.len()));
        }
        self.cache.write_all(request.as_bytes()).await?;
        self.cache.flush().await?;
        let mut answer = String::new();
        self.cache.read_line(&mut answer).await?;
        if !answer.starts_with('+') {
            bail!("Redis answered {answer:?} to {}", words[0]);
        }
        Ok(())
    }
}

fn unavailable(error: impl Display) -> (StatusCode, String) {
    (StatusCode::SERVICE_UNAVAILABLE, format!("{error:#}\n"))
}

/// Does `write`, or asks for health when there is none.
async fn serve(service: &Service, write: Option<&Write>) -> Result<(), (StatusCode, String)> {
    let slot = service.next.fetch_add(1, Ordering::Relaxed) % POOL;
    let mut slot = service.slots[slot].lock().await;
    // Taken out: whatever goes wrong, also a time-out, the connections are not used again.
    let taken = slot.take();
    let work = async {
        let mut connections = match taken {
            Some(connections) => connections,
            None => Connections::open(service).await?,
        };
        match write {
            Some(write) => connections.write(write).await?,
            None => connections.health().await?,
        }
        anyhow::Ok(connections)
    };
    match timeout(PATIENCE, work).await {
        Ok(Ok(connections)) => {
            *slot = Some(connections);
            Ok(())
        }
        Ok(Err(error)) => Err(unavailable(error)),
        Err(error) => Err(unavailable(error)),
    }
}

async fn write(
    State(service): State<Arc<Service>>,
    Json(write): Json<Write>,
) -> Result<(), (StatusCode, String)> {
    serve(&service, Some(&write)).await
}

async fn health(State(service): State<Arc<Service>>) -> Result<(), (StatusCode, String)> {
    serve(&service, None).await
}

#[tokio::main]
async fn main() -> Result<()> {
    let service = Arc::new(Service {
        db: env::var("DB").context("DB=host:port of PostgreSQL")?,
        cache: env::var("CACHE").context("CACHE=host:port of Redis")?,
        slots: Default::default(),
        next: AtomicUsize::new(0),
    });
    let router = Router::new()
        .route("/write", post(write))
        .route("/health", get(health))
        .with_state(service);
    let listener = TcpListener::bind("[::]:8000").await.context("port 8000")?;
    let mut end = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    axum::serve(listener, router)
        // As PID 1 the service has no default action for SIGTERM.
        .with_graceful_shutdown(async move {
            end.recv().await;
        })
        .await?;
    Ok(())
}
