//! Images of the containers that move: exported for the journey, without the layers that the target holds.

use super::moving::{Move, MoveError};
use super::source::slow_down;
use crate::model::ids::VolumeId;
use crate::model::units::Bytes;
use crate::model::volume::{VolumeKind, VolumeSpec};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// The layers of each image of the plan.
pub(super) async fn layers(core: &Move) -> Result<BTreeMap<VolumeId, Vec<String>>, MoveError> {
    let mut layers = BTreeMap::new();
    for volume in &core.plan.volumes {
        let owner = volume.containers.first();
        if matches!(volume.kind, VolumeKind::Image(_))
            && let Some(planned) = owner.and_then(|name| core.plan.container(name))
        {
            let runtime = core.delegator.runtime_of(planned)?;
            let of_image = runtime.image_layers(&planned.container.image_id).await?;
            layers.insert(volume.id, of_image);
        }
    }
    Ok(layers)
}

/// The lowest layers of each image, as many as the target holds.
pub(super) fn held_layers(
    layers: &BTreeMap<VolumeId, Vec<String>>,
    held: &BTreeMap<VolumeId, usize>,
) -> BTreeMap<VolumeId, Vec<String>> {
    let lowest = |(volume, layers): (&VolumeId, &Vec<String>)| {
        let count = held.get(volume).copied().unwrap_or(0);
        (*volume, layers.iter().take(count).cloned().collect())
    };
    layers.iter().map(lowest).collect()
}

/// Exports each image once, without the layers that the target holds; they travel as one archive each.
pub(super) async fn export_images(
    core: &Move,
    volumes: &[VolumeSpec],
    held: &BTreeMap<VolumeId, Vec<String>>,
) -> Result<(), MoveError> {
    let images = volumes.iter().filter_map(|volume| match &volume.kind {
        VolumeKind::Image(reference) => Some((volume, reference)),
        _ => None,
    });
    let total: Bytes = images.clone().map(|(volume, _)| volume.size).sum();
    if total.0 == 0 {
        return Ok(());
    }
    core.enter("export images")?;
    slow_down(core);
    let (exported, progress) = (core.active.exporting(total), core.active.progress());
    for (volume, reference) in images {
        let directory = &volume.source_path;
        tokio::fs::create_dir_all(directory)
            .await
            .map_err(|error| MoveError::File {
                doing: format!("create {}", directory.display()),
                error,
            })?;
        let owner = volume.containers.first();
        if let Some(planned) = owner.and_then(|name| core.plan.container(name)) {
            let runtime = core.delegator.runtime_of(planned)?;
            let archive = directory.join(IMAGE_FILE);
            let without = held.get(&volume.id).map_or(&[][..], Vec::as_slice);
            let export = runtime.export_image(reference, &archive, without, |bytes| {
                exported.fetch_add(bytes, Ordering::Relaxed);
                progress.pace.take(bytes, Instant::now())
            });
            core.active.unless_cancelled(export).await?;
        }
    }
    Ok(())
}

/// Name of the archive inside an image volume's directory.
pub(super) const IMAGE_FILE: &str = "image.tar";

/// Removes the exports of images, which were only made for the journey; a sick disk wants its space back.
pub(super) async fn drop_exports(core: &Move) {
    let images = core.delegator.image_directory(&core.plan.id);
    let _ = tokio::fs::remove_dir_all(images).await;
}
