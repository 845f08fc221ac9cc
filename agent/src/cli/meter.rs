//! A plan's progress in one line: phase, amount, rate and remaining time, from one look to the next.

use super::output::redraw;
use crate::migration::{Limits, PlanStatus};
use crate::model::units::{Bytes, human_duration};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Share of the newest rate in the smoothed one; looks are a quarter of a second to a second apart.
const NEWEST: f64 = 0.3;

/// Between two lines about the same phase without a terminal.
const EACH: Duration = Duration::from_secs(30);

/// One plan's meter.
#[derive(Default)]
pub struct Meter {
    last: Option<Look>,
    /// None before the second look at a phase.
    rate: Option<f64>,
    drawn: bool,
    told: (String, Option<String>),
    told_at: Option<Instant>,
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
                let rate = self.rate.unwrap_or(newest);
                self.rate = Some(rate + NEWEST * (newest - rate));
            }
            _ => self.rate = None,
        }
        self.last = Some(Look {
            at: now,
            phase: plan.phase.clone(),
            done,
        });
        let moves = exports || plan.phase == "replicate";
        // Later rounds read what changed on top of it.
        let total = total.max(done);
        let left = total.0.saturating_sub(done.0) as f64;
        let remaining = match self.rate {
            Some(rate) if moves && rate > 1.0 => {
                let left = Duration::from_secs_f64(left / rate);
                format!(", {} left", human_duration(left))
            }
            _ => String::new(),
        };
        let rate = self.rate.map(|rate| Bytes(rate as u64));
        let rate = rate.map_or_else(String::new, |rate| format!(", {rate}/s"));
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
            "plan {}: {}: {done} of about {total} read, {} sent{rate}{}{remaining}{retrying}",
            plan.plan,
            plan.phase,
            plan.bytes_sent,
            limited(&plan.limits),
        )
    }

    /// Draws the line over itself on a terminal; elsewhere prints one for each new phase or trouble, and now and then.
    pub fn draw(&mut self, plan: &PlanStatus) {
        let line = self.line(plan);
        if std::io::stderr().is_terminal() {
            redraw(&line);
            self.drawn = true;
        } else if self.is_due(plan, Instant::now()) {
            eprintln!("{line}");
        }
    }

    fn is_due(&mut self, plan: &PlanStatus, now: Instant) -> bool {
        let news = (plan.phase.clone(), plan.trouble.clone());
        let late = |told: Instant| now.saturating_duration_since(told) >= EACH;
        let is_due = self.told != news || self.told_at.is_none_or(late);
        if is_due {
            (self.told, self.told_at) = (news, Some(now));
        }
        is_due
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

#[cfg(test)]
mod tests {
    use super::*;

    fn status(phase: &str, read: u64) -> PlanStatus {
        let text = format!(
            r#"{{"plan":"p","phase":"{phase}","over":false,"target":null,"paired":null,"bytes_read":{read},
                "bytes_sent":0,"bytes_total":1048576,"images":[0,0],"since":0,"twins":[],"trouble":null}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn a_rate_is_told_once_there_were_two_looks_and_never_more_than_all_is_read() {
        let mut meter = Meter::default();
        let first = meter.line(&status("replicate", 0));
        assert!(!first.contains("/s"), "{first}");
        std::thread::sleep(Duration::from_millis(20));
        let second = meter.line(&status("replicate", 1 << 19));
        assert!(
            second.contains("/s") && !second.contains(" 0 B/s"),
            "{second}"
        );
        let changeset = meter.line(&status("replicate", 3 << 20));
        assert!(
            changeset.contains("3.0 MiB of about 3.0 MiB"),
            "{changeset}"
        );
        let next = meter.line(&status("switch", 3 << 20));
        assert!(!next.contains("/s"), "{next}");
    }

    #[test]
    fn without_a_terminal_there_is_a_line_for_each_phase_and_now_and_then_one_with_a_rate() {
        let (mut meter, now) = (Meter::default(), Instant::now());
        assert!(meter.is_due(&status("replicate", 0), now));
        assert!(!meter.is_due(&status("replicate", 1), now + EACH / 2));
        assert!(meter.is_due(&status("replicate", 2), now + EACH));
        assert!(meter.is_due(&status("switch", 2), now + EACH));
    }
}
