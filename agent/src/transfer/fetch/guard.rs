//! What closes the records of a fetching connection: a seal, or on a link that the operator declared trusted a tag alone.

use crate::model::ids::PlanId;
use crate::transfer::frame::{FrameKind, HEADER_LEN, Header};
use crate::transfer::seal::{DataKey, LinkKey, OpenFailed, Salt, Sealer, Tagger};

pub(super) enum Guard {
    Seal(Sealer),
    Tag(Tagger),
}

impl Guard {
    /// For the connection with this salt; without a data key its records are not sealed.
    pub(super) fn new(
        plan: &PlanId,
        link_key: &LinkKey,
        data_key: Option<&DataKey>,
        salt: &Salt,
    ) -> Self {
        if let Some(key) = data_key {
            return Self::Seal(Sealer::new(plan, key, salt));
        }
        let mut session = [0; 16];
        session.copy_from_slice(&salt[..16]);
        Self::Tag(Tagger::new(link_key, &session))
    }

    /// Closes the payload that follows the place for the header in `record`, and writes the header.
    pub(super) fn close(&self, header: &Header, record: &mut Vec<u8>) {
        match self {
            Self::Seal(sealer) => sealer.seal(header, record),
            Self::Tag(tagger) => tagger.wrap(header, record),
        }
    }

    /// The payload of a record that arrived with its header at its front.
    pub(super) fn open<'r>(
        &self,
        header: &Header,
        record: &'r mut Vec<u8>,
    ) -> Result<&'r [u8], OpenFailed> {
        match self {
            Self::Seal(sealer) => sealer.open(header, &mut record[HEADER_LEN..]),
            Self::Tag(_) if header.kind != FrameKind::Carried => Err(OpenFailed),
            Self::Tag(tagger) => {
                tagger.unwrap(header, record)?;
                Ok(&record[HEADER_LEN..])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ids::{Epoch, VolumeId};

    #[test]
    fn a_record_is_opened_only_by_the_same_guard_and_as_it_was_closed() {
        let plan = PlanId::from("plan");
        let guard = |link, data: Option<u8>, salt| {
            let data = data.map(|key| DataKey([key; 32]));
            Guard::new(&plan, &LinkKey([link; 32]), data.as_ref(), &[salt; 32])
        };
        let header = Header {
            kind: FrameKind::Sealed,
            barrier: false,
            length: 0,
            volume: VolumeId(1),
            epoch: Epoch(0),
            number: 7,
            first_block: 0,
        };
        for data in [None, Some(2)] {
            let mut record = vec![0; HEADER_LEN];
            record.extend_from_slice(b"a block");
            guard(1, data, 3).close(&header, &mut record);
            let is_plain = record.windows(7).any(|part| part == b"a block");
            assert_eq!(is_plain, data.is_none());
            let mut head = [0; HEADER_LEN];
            head.copy_from_slice(&record[..HEADER_LEN]);
            let header = Header::decode(&head).unwrap();
            let opened = |guard: Guard, record: &[u8]| {
                let mut record = record.to_vec();
                let opened = guard.open(&header, &mut record);
                opened.map(<[u8]>::to_vec)
            };
            assert_eq!(opened(guard(1, data, 3), &record).unwrap(), b"a block");
            assert!(opened(guard(1, data, 4), &record).is_err());
            let other = if data.is_some() { None } else { Some(2) };
            assert!(opened(guard(1, other, 3), &record).is_err());
            for at in HEADER_LEN..record.len() {
                let mut changed = record.clone();
                changed[at] ^= 1;
                assert!(opened(guard(1, data, 3), &changed).is_err());
            }
        }
    }
}
