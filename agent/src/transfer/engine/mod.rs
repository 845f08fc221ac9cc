//! What a data thread asks of the kernel, behind one trait: io_uring where the kernel allows it, and
//! plain blocking calls where it does not.
//!
//! Invariants: both engines give the same results, and the same tests run over both; an engine
//! belongs to one thread.

mod threads;

use nix::errno::Errno;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Once;
use std::time::Duration;

pub use super::uring::UringEngine;
pub use threads::ThreadEngine;
pub(super) use threads::{open_for_reading, write_whole};

/// Which engine does the work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EngineChoice {
    /// io_uring, or threads where it is forbidden.
    #[default]
    Auto,
    /// io_uring or an error.
    IoUring,
    /// Plain blocking calls.
    Threads,
}

/// A read at a place in a file.
#[derive(Debug)]
pub struct Read<'a> {
    /// The file.
    pub file: BorrowedFd<'a>,
    /// Offset in bytes.
    pub offset: u64,
    /// Where the bytes go.
    pub buffer: &'a mut [u8],
    /// Bytes wanted; past the page cache the buffer is longer, up to a whole sector.
    pub length: usize,
    /// What is not in the page cache need not stay there: it is read only once.
    pub once: bool,
    /// Bytes read, fewer than wanted only at the end of the file.
    pub done: io::Result<usize>,
}

/// A write at a place in a file.
#[derive(Debug)]
pub struct Write<'a> {
    /// The file.
    pub file: BorrowedFd<'a>,
    /// Offset in bytes.
    pub offset: u64,
    /// The bytes.
    pub bytes: &'a [u8],
    /// The file was opened past the page cache.
    pub direct: bool,
    /// Whether all of them were written.
    pub done: io::Result<()>,
}

/// File and socket I/O for one data thread.
pub trait Engine: Send {
    /// Name for logs and reports.
    fn name(&self) -> &'static str;
    /// Opens regular files for reading beneath `root`, confined, without updating access times.
    fn open_files(&mut self, root: BorrowedFd<'_>, paths: &[&[u8]]) -> Vec<Result<OwnedFd, Errno>>;
    /// Does all reads; each tells how it went.
    fn read(&mut self, reads: &mut [Read<'_>]);
    /// Does all writes; each tells how it went.
    fn write(&mut self, writes: &mut [Write<'_>]);
    /// Sends all bytes.
    ///
    /// # Errors
    /// The socket's error; `TimedOut` when the peer takes nothing for `patience`.
    fn send(&mut self, socket: BorrowedFd<'_>, bytes: &[u8], patience: Duration) -> io::Result<()>;
    /// Receives until `buffer` is full.
    ///
    /// # Errors
    /// The socket's error; `UnexpectedEof` when the peer closed; `TimedOut` when nothing comes for
    /// `patience`.
    fn receive(
        &mut self,
        socket: BorrowedFd<'_>,
        buffer: &mut [u8],
        patience: Duration,
    ) -> io::Result<()>;
}

/// The engine that was asked for does not run here.
#[derive(Debug, thiserror::Error)]
#[error("io_uring does not run here ({0}); choose the engine `auto` or `threads`")]
pub struct NoEngine(pub io::Error);

/// Makes an engine for one data thread.
///
/// # Errors
/// io_uring was demanded and the kernel refuses it.
pub fn engine(choice: EngineChoice) -> Result<Box<dyn Engine>, NoEngine> {
    static SAID: Once = Once::new();
    match choice {
        EngineChoice::Threads => {
            SAID.call_once(|| tracing::info!("io_uring is not wanted; plain threads do the work"));
            Ok(Box::new(ThreadEngine))
        }
        EngineChoice::IoUring => Ok(Box::new(UringEngine::new().map_err(NoEngine)?)),
        EngineChoice::Auto => match UringEngine::new() {
            Ok(engine) => Ok(Box::new(engine)),
            Err(error) => {
                SAID.call_once(|| {
                    tracing::warn!(
                        "io_uring does not run here ({error}); plain threads do the work"
                    );
                });
                Ok(Box::new(ThreadEngine))
            }
        },
    }
}

/// Name of the engine that [`EngineChoice`] leads to on this host.
#[must_use]
pub fn name_of(choice: EngineChoice) -> &'static str {
    engine(choice).map_or("none", |engine| engine.name())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::time::Instant;

    /// Both engines, or only threads with the reason printed.
    fn engines() -> Vec<Box<dyn Engine>> {
        let mut engines: Vec<Box<dyn Engine>> = vec![Box::new(ThreadEngine)];
        match engine(EngineChoice::IoUring) {
            Ok(engine) => engines.push(engine),
            Err(error) => println!("io_uring not tested: {error}"),
        }
        engines
    }

    fn sockets() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let caller = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (caller, listener.accept().unwrap().0)
    }

    #[test]
    fn what_is_written_in_a_batch_is_read_back_in_a_batch() {
        for mut engine in engines() {
            let dir = tempfile::tempdir().unwrap();
            let root = std::fs::File::open(dir.path()).unwrap();
            let names: Vec<String> = (0..300).map(|n| format!("f{n}")).collect();
            let contents: Vec<Vec<u8>> = (0..300).map(|n| vec![n as u8; n * 7]).collect();
            let files: Vec<std::fs::File> = names
                .iter()
                .map(|name| std::fs::File::create(dir.path().join(name)).unwrap())
                .collect();
            let mut writes: Vec<Write<'_>> = files
                .iter()
                .zip(&contents)
                .map(|(file, bytes)| Write {
                    file: file.as_fd(),
                    offset: 3,
                    bytes,
                    direct: bytes.len() % 2 == 1,
                    done: Ok(()),
                })
                .collect();
            engine.write(&mut writes);
            assert!(writes.iter().all(|write| write.done.is_ok()));
            let mut paths: Vec<&[u8]> = names.iter().map(String::as_bytes).collect();
            paths.push(b"missing");
            paths.push(b"../etc/passwd");
            let opened = engine.open_files(root.as_fd(), &paths);
            assert_eq!(*opened[300].as_ref().unwrap_err(), Errno::ENOENT);
            assert_eq!(*opened[301].as_ref().unwrap_err(), Errno::EXDEV);
            // One byte more than there is: the end of the file shows as a short count.
            let mut buffers: Vec<Vec<u8>> = (0..300).map(|n| vec![0xee; n * 7 + 1]).collect();
            let mut reads: Vec<Read<'_>> = opened[..300]
                .iter()
                .zip(&mut buffers)
                .map(|(file, buffer)| Read {
                    file: file.as_ref().unwrap().as_fd(),
                    offset: 3,
                    once: buffer.len() % 2 == 1,
                    length: buffer.len(),
                    buffer,
                    done: Ok(0),
                })
                .collect();
            engine.read(&mut reads);
            for (read, content) in reads.iter().zip(&contents) {
                assert_eq!(*read.done.as_ref().unwrap(), content.len());
                assert_eq!(read.buffer[..content.len()], content[..]);
            }
        }
    }

    #[test]
    fn a_silent_peer_times_out_and_the_engine_works_on() {
        for mut engine in engines() {
            let (caller, mut callee) = sockets();
            let mut buffer = [0; 4];
            let (patience, began) = (Duration::from_millis(800), Instant::now());
            let error = engine.receive(caller.as_fd(), &mut buffer, patience);
            assert_eq!(error.unwrap_err().kind(), io::ErrorKind::TimedOut);
            let took = began.elapsed();
            assert!(
                (patience..patience * 3 / 2).contains(&took),
                "{}: {took:?}",
                engine.name()
            );
            callee.write_all(b"late").unwrap();
            engine
                .receive(caller.as_fd(), &mut buffer, Duration::from_secs(5))
                .unwrap();
            assert_eq!(&buffer, b"late", "the cancelled read took nothing");
        }
    }

    #[test]
    fn a_peer_that_takes_nothing_times_out() {
        for mut engine in engines() {
            let (caller, _callee) = sockets();
            let bytes = vec![0; 64 << 20];
            let error = engine.send(caller.as_fd(), &bytes, Duration::from_millis(50));
            assert_eq!(error.unwrap_err().kind(), io::ErrorKind::TimedOut);
        }
    }

    #[test]
    fn bytes_go_through_a_socket_whole_and_its_end_is_told() {
        for mut engine in engines() {
            let (caller, mut callee) = sockets();
            let bytes: Vec<u8> = (0..5_000_000_u32).map(|n| (n % 251) as u8).collect();
            let expected = bytes.clone();
            let reader = std::thread::spawn(move || {
                let mut got = Vec::new();
                callee.read_to_end(&mut got).unwrap();
                callee.write_all(&got).unwrap();
                got == expected
            });
            engine
                .send(caller.as_fd(), &bytes, Duration::from_secs(5))
                .unwrap();
            caller.shutdown(std::net::Shutdown::Write).unwrap();
            let mut back = vec![0; bytes.len()];
            engine
                .receive(caller.as_fd(), &mut back, Duration::from_secs(5))
                .unwrap();
            assert_eq!(back, bytes);
            let end = engine.receive(caller.as_fd(), &mut back[..1], Duration::from_secs(5));
            assert_eq!(end.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
            assert!(reader.join().unwrap());
        }
    }
}
