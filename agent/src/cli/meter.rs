//! A plan's progress in one line: phase, amount, rate and remaining time, from one look to the next.

use super::output::redraw;
use crate::migration::{Limits, PlanStatus};
use crate::model::units::{Bytes, human_duration};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Share of the newest rate in the smoothed one; looks are a quarter of a second to a second apart.
const NEWEST: f64 = 0.3;

/// One plan's meter.
#[derive(Default)]
pub struct Meter {
    last: Option<Look>,
    rate: f64,
    drawn: bool,
    told: (String, Option<String>),
}

struct Look {
    at: Instant,
    phase: String,
    done: Bytes,
}

impl Meter {
    /// The line for a plan as it is now.
    pub fn line(&mut self, plan: &PlanStatus) -> String {
        let exports = plan.phase == "export images";
        let (done, total) = if exports {
            plan.images
        } else {
            (plan.bytes_read, plan.bytes_total)
        };
        let now = Instant::now();
        match &self.last {
            Some(last) if last.phase == plan.phase => {
                let seconds = now.duration_since(last.at).as_secs_f64().max(1e-3);
                let newest = done.0.saturating_sub(last.done.0) as f64 / seconds;
                self.rate += NEWEST * (newest - self.rate);
            }
            _ => self.rate = 0.0,
        }
        self.last = Some(Look {
            at: now,
            phase: plan.phase.clone(),
            done,
        });
        let moves = exports || plan.phase == "replicate";
        let left = total.0.saturating_sub(done.0) as f64;
        let remaining = if moves && self.rate > 1.0 {
            let left = Duration::from_secs_f64(left / self.rate);
            format!(", {} left", human_duration(left))
        } else {
            String::new()
        };
        let trouble = plan.trouble.as_ref();
        let retrying = trouble.map_or_else(String::new, |text| format!(" [retrying: {text}]"));
        let arrival = plan
            .arrival
            .as_ref()
            .filter(|arrival| !arrival.whole && !plan.over);
        if let Some(arrival) = arrival {
            return format!(
                "plan {}: {}: switched first: {} there{retrying}",
                plan.plan,
                plan.phase,
                arrival.share()
            );
        }
        format!(
            "plan {}: {}: {done} of about {total} read, {} sent, {}/s{}{remaining}{}",
            plan.plan,
            plan.phase,
            plan.bytes_sent,
            Bytes(self.rate as u64),
            limited(&plan.limits),
            retrying,
        )
    }

    /// Draws the line over itself on a terminal; elsewhere prints one for each new phase or trouble.
    pub fn draw(&mut self, plan: &PlanStatus) {
        let line = self.line(plan);
        let now = (plan.phase.clone(), plan.trouble.clone());
        if std::io::stderr().is_terminal() {
            redraw(&line);
            self.drawn = true;
        } else if self.told != now {
            eprintln!("{line}");
        }
        self.told = now;
    }

    /// Ends the line.
    pub fn end(&mut self) {
        if std::mem::take(&mut self.drawn) {
            eprintln!();
        }
    }
}

/// The least limit and whose it is, and what the workload loses.
fn limited(limits: &Limits) -> String {
    let all = [
        (limits.cap, "limit"),
        (limits.advance, "copy in advance"),
        (limits.workload, "spares the workload"),
    ];
    let least = all
        .into_iter()
        .filter_map(|(rate, whose)| Some((rate?, whose)))
        .min_by_key(|(rate, _)| *rate);
    let lost = limits.workload_loss_percent;
    let lost = lost.map_or_else(String::new, |percent| format!(", it loses {percent} %"));
    least.map_or_else(String::new, |(rate, whose)| {
        let lost = if limits.workload.is_some() {
            &*lost
        } else {
            ""
        };
        format!(" of at most {rate}/s ({whose}{lost})")
    })
}
