//! Images: whether one is there, out into one archive file, and in from it.
//!
//! Invariants: nothing is pulled; an image that was loaded is only reported as such when the runtime
//! then shows exactly the id the source had.
//! Non-goals: which layers another device holds.

use super::client::{Runtime, RuntimeError, escape};
use super::layers::{Change, Sieve};
use futures_util::StreamExt as _;
use serde_json::Value;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::fs::File;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _};

/// Piece in which an archive is read from its file.
const PIECE: usize = 256 << 10;

/// An image could not be exported or loaded.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The runtime failed.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// The archive file cannot be written or read.
    #[error("cannot use the image archive {}: {source}", path.display())]
    File {
        /// The archive.
        path: PathBuf,
        /// The file system's answer.
        source: io::Error,
    },
    /// The runtime loaded something, but not this image.
    #[error(
        "loaded {} but the runtime does not know image {expected} afterwards; it said: {said}; \
         the two runtimes convert images differently: use the same runtime on both devices",
        path.display()
    )]
    OtherImage {
        /// The archive.
        path: PathBuf,
        /// The id the source has.
        expected: String,
        /// The runtime's report.
        said: String,
    },
}

/// An image that is present on this device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadedImage {
    /// Its id, equal to the source's.
    pub id: String,
    /// Whether it had been there before, so that nothing was loaded.
    pub was_present: bool,
}

impl Runtime {
    /// Id of an image by id or reference; `None` when the runtime has no such image.
    ///
    /// # Errors
    /// When the runtime fails.
    pub async fn image_id(&self, image: &str) -> Result<Option<String>, RuntimeError> {
        let path = format!("/images/{}/json", escape(image));
        let answer: Result<Value, _> = self.get(&path, &format!("look for image {image}")).await;
        match answer {
            Ok(image) => Ok(image["Id"].as_str().map(with_algorithm)),
            Err(error) if error.not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Size of an image in bytes, layers that it shares with others included; 0 when the runtime does
    /// not tell.
    ///
    /// # Errors
    /// When the runtime fails or has no such image.
    pub async fn image_size(&self, image: &str) -> Result<u64, RuntimeError> {
        let path = format!("/images/{}/json", escape(image));
        let image: Value = self.get(&path, &format!("look at image {image}")).await?;
        Ok(image["Size"].as_u64().unwrap_or(0))
    }

    /// Diff ids of an image's layers, the lowest first.
    ///
    /// # Errors
    /// When the runtime fails or has no such image.
    pub async fn image_layers(&self, image: &str) -> Result<Vec<String>, RuntimeError> {
        let path = format!("/images/{}/json", escape(image));
        let image: Value = self.get(&path, &format!("look at image {image}")).await?;
        let layers = image["RootFS"]["Layers"].as_array().into_iter().flatten();
        Ok(layers
            .filter_map(|layer| layer.as_str().map(str::to_owned))
            .collect())
    }

    /// The layers of every image that is there.
    ///
    /// # Errors
    /// When the runtime fails.
    pub async fn all_layers(&self) -> Result<Vec<Vec<String>>, RuntimeError> {
        let images: Value = self.get("/images/json", "list the images").await?;
        let mut all = Vec::new();
        for image in images.as_array().into_iter().flatten() {
            let Some(id) = image["Id"].as_str() else {
                continue;
            };
            match self.image_layers(id).await {
                Ok(layers) => all.push(layers),
                // Removed meanwhile.
                Err(error) if error.not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }

    /// Whether the image with this id is there.
    ///
    /// # Errors
    /// When the runtime fails.
    pub async fn image_present(&self, id: &str) -> Result<bool, RuntimeError> {
        Ok(self.image_id(id).await?.is_some())
    }

    /// Writes an image as one archive to a new file; returns its length in bytes. The reference travels
    /// inside. The archive is the runtime's own: Docker's format, which keeps the image id. `written` is told
    /// of the bytes of each piece, and says how long to wait before the next. The layers `without` are left out:
    /// only a runtime that holds them can load the archive.
    ///
    /// # Errors
    /// When the runtime has no such image, or the file cannot be written; the file may then be partial.
    pub async fn export_image(
        &self,
        reference: &str,
        into: &Path,
        without: &[String],
        written: impl Fn(u64) -> Duration,
    ) -> Result<u64, ImageError> {
        let file_error = |source| ImageError::File {
            path: into.to_owned(),
            source,
        };
        let path = format!("/images/{}/get", escape(reference));
        let pieces = self
            .stream(&path, &format!("export image {reference}"))
            .await?;
        let mut pieces = Box::pin(pieces);
        let mut file = File::create(into).await.map_err(file_error)?;
        let mut sieve = Sieve::new(without);
        while let Some(piece) = pieces.next().await {
            let piece = piece?;
            for change in sieve.feed(&piece) {
                make(&mut file, change).await.map_err(file_error)?;
            }
            tokio::time::sleep(written(piece.len() as u64)).await;
        }
        file.sync_all().await.map_err(file_error)?;
        let written = file.metadata().await.map_err(file_error)?;
        Ok(written.len())
    }

    /// Loads an archive made by [`Runtime::export_image`], unless the image is there already, and gives
    /// it its reference back.
    ///
    /// # Errors
    /// When the file cannot be read, the runtime refuses it, or the image it makes of it has another id.
    pub async fn load_image(
        &self,
        archive: &Path,
        expected_id: &str,
        reference: &str,
    ) -> Result<LoadedImage, ImageError> {
        let was_present = self.image_present(expected_id).await?;
        if !was_present {
            let said = self.load(archive).await?;
            if !self.image_present(expected_id).await? {
                return Err(ImageError::OtherImage {
                    path: archive.to_owned(),
                    expected: expected_id.to_owned(),
                    said,
                });
            }
        }
        self.tag(expected_id, reference).await?;
        Ok(LoadedImage {
            id: with_algorithm(expected_id),
            was_present,
        })
    }

    async fn load(&self, archive: &Path) -> Result<String, ImageError> {
        let file = File::open(archive)
            .await
            .map_err(|source| ImageError::File {
                path: archive.to_owned(),
                source,
            })?;
        let pieces = futures_util::stream::try_unfold(file, |mut file| async move {
            let mut piece = bytes::BytesMut::with_capacity(PIECE);
            let length = file.read_buf(&mut piece).await?;
            Ok((length > 0).then(|| (piece.freeze(), file)))
        });
        let operation = format!("load image archive {}", archive.display());
        Ok(self
            .upload("/images/load?quiet=true", pieces, &operation)
            .await?)
    }

    /// Points a reference at an image; a reference that is an id or a digest needs none.
    async fn tag(&self, id: &str, reference: &str) -> Result<(), RuntimeError> {
        let Some((repository, tag)) = split_reference(reference) else {
            return Ok(());
        };
        if self.image_id(reference).await?.as_deref() == Some(&with_algorithm(id)) {
            return Ok(());
        }
        let path = format!(
            "/images/{}/tag?repo={}&tag={}",
            escape(id),
            escape(repository),
            escape(tag)
        );
        self.post(&path, None, &format!("tag image {id} as {reference}"))
            .await
            .map(|_| ())
    }
}

async fn make(file: &mut File, change: Change) -> io::Result<()> {
    match change {
        Change::Append(bytes) => file.write_all(&bytes).await,
        Change::CutTo(length) => {
            file.flush().await?;
            file.set_len(length).await?;
            file.seek(io::SeekFrom::Start(length)).await.map(drop)
        }
    }
}

/// Repository and tag of a reference; `None` for ids and digests.
fn split_reference(reference: &str) -> Option<(&str, &str)> {
    let bare_id = reference.len() == 64 && reference.bytes().all(|b| b.is_ascii_hexdigit());
    if reference.is_empty()
        || bare_id
        || reference.contains('@')
        || reference.starts_with("sha256:")
    {
        return None;
    }
    // A colon before the last slash belongs to a registry's port.
    match reference.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => Some((repository, tag)),
        _ => Some((reference, "latest")),
    }
}

/// Podman's own API writes ids without the algorithm.
fn with_algorithm(id: &str) -> String {
    if id.contains(':') {
        id.to_owned()
    } else {
        format!("sha256:{id}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_split_at_the_tag_and_not_at_a_port() {
        assert_eq!(
            split_reference("localhost/bb:1"),
            Some(("localhost/bb", "1"))
        );
        assert_eq!(
            split_reference("host:5000/bb"),
            Some(("host:5000/bb", "latest"))
        );
        assert_eq!(split_reference("bb@sha256:00"), None);
        assert_eq!(split_reference(&"a".repeat(64)), None);
    }
}
