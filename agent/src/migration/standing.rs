//! The paired device's side of `serve`: it answers the target in the source's stead, and fetches what it lacks.
//!
//! Invariants: only the plan's target is let in, and only as long as the source lends it this device; what was fetched
//! lies in files without names, so that it is gone with the plan or with the process. Each copy that the target makes
//! of a volume begins with nothing, so that none is answered with what was read before its list. Non-goal: blocks on
//! their way to the target (`paired`).

use super::access::admit;
use super::active::locked;
use super::delegator::Parts;
use super::paired::RelayError;
use crate::fleet::agent::Authorisation;
use crate::model::control::{Provided, Secret, StandIn, StoodIn};
use crate::model::ids::{PlanId, VolumeId};
use crate::model::units::Bytes;
use crate::transfer::fetch::{FetchPlan, Stock, Tally};
use crate::transfer::{DataKey, Door, LinkKey, ProvidePlan, ProvideVolume, Sealing, Whereabouts};
use crate::volume::FleetKey;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};

/// One copy of a volume that the target makes.
struct Standing {
    copy: u64,
    provided: Provided,
    stock: Arc<Stock>,
}

/// What this device answers of one plan.
#[derive(Default)]
struct Answered {
    volumes: BTreeMap<VolumeId, Standing>,
    /// Of copies that are over.
    past: StoodIn,
}

impl Answered {
    fn all(&self) -> StoodIn {
        let stocks = self.volumes.values();
        stocks.fold(self.past, |sum, one| add(sum, &one.stock))
    }
}

fn add(sum: StoodIn, stock: &Stock) -> StoodIn {
    let turnover = stock.turnover();
    StoodIn {
        answered: Bytes(sum.answered.0 + turnover.answered),
        fetched: Bytes(sum.fetched.0 + turnover.fetched),
    }
}

/// Everything that this device answers in the stead of sources.
#[derive(Default)]
pub(super) struct Stands(Mutex<BTreeMap<PlanId, Answered>>);

impl Stands {
    /// The keys for a copy of a volume; asked for the same copy again, it gives the same. May wait for the disk.
    pub(super) fn open(
        &self,
        parts: &Arc<Parts>,
        lent: &Authorisation,
        directory: &Path,
        (data, asked): (SocketAddr, &StandIn),
    ) -> Result<Provided, RelayError> {
        let (Some(server), Some(fleet)) = (&parts.data, &parts.fleet) else {
            return Err(RelayError::NoData);
        };
        let (plan, volume) = (&lent.plan, asked.volume);
        let mut plans = locked(&self.0);
        let answered = plans.entry(plan.clone()).or_default();
        if let Some(known) = answered.volumes.get(&volume)
            && known.copy == asked.copy
        {
            if asked.fill {
                known.stock.fill();
            }
            return Ok(known.provided.clone());
        }
        let fleet_key = FleetKey(*fleet.identity.fleet_key());
        let fetch = FetchPlan {
            plan: plan.clone(),
            volume,
            fleet_key: fleet_key.clone(),
            admit: admit(parts, &lent.peer, plan),
            stand_in: None,
            // The target asks the source itself for what cannot be had here.
            insists: false,
            tally: Tally::default(),
        };
        let stock = Stock::start(fetch, &parts.transfer, directory);
        let stock = stock.map_err(|error| RelayError::Spool {
            path: directory.to_owned(),
            error,
        })?;
        if asked.fill {
            stock.fill();
        }
        let (link_key, data_key) = (Secret(rand::random()), Secret(rand::random()));
        server.admit_provide(
            Door::StandIn(volume),
            ProvidePlan {
                plan: plan.clone(),
                link_key: LinkKey(link_key.0),
                sealing: Sealing::Under(DataKey(data_key.0)),
                fleet_key,
                volumes: vec![ProvideVolume {
                    id: volume,
                    at: Whereabouts::There(Arc::clone(&stock)),
                }],
            },
        );
        tracing::info!(%plan, %volume, source = %lent.source, "answers the target in the source's stead");
        let provided = Provided {
            data,
            link_key,
            data_key: Some(data_key),
        };
        let new = Standing {
            copy: asked.copy,
            provided: provided.clone(),
            stock,
        };
        if let Some(old) = answered.volumes.insert(volume, new) {
            answered.past = add(answered.past, &old.stock);
        }
        Ok(provided)
    }

    /// Forgets a plan, whose doors are closed; what was answered of it.
    pub(super) fn end(&self, plan: &PlanId) -> Option<StoodIn> {
        let answered = locked(&self.0).remove(plan)?;
        Some(answered.all())
    }
}
