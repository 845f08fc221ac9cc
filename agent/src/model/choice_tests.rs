//! What is chosen, and what rounds measure: cases with figures, and properties over any outlook.

use super::choice::{Bounds, Changeset, Deadline, Measured, Next, Outlook, Rate, Way};
use super::units::{Bytes, UnixMillis};
use proptest::prelude::*;
use std::time::Duration;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn rate(bytes: u64) -> Rate {
    Rate {
        bytes: Bytes(bytes),
        from: "measured".into(),
    }
}

fn outlook(size: u64, copy: u64, dirty: Option<u64>) -> Outlook {
    Outlook {
        copied: Bytes(0),
        size: Bytes(size),
        rounds: 0,
        last: None,
        before: None,
        whole: None,
        copy: rate(copy),
        dirty: dirty.map(rate),
        overhead: Duration::ZERO,
        deadline: None,
        obstacle: None,
        word: None,
        bounds: Bounds {
            threshold: Bytes(16 * MIB),
            rounds: 8,
            pause: Duration::from_secs(30),
        },
    }
}

fn within(seconds: u64) -> Option<Deadline> {
    Some(Deadline {
        left: Duration::from_secs(seconds),
        threshold: "too-hot".into(),
    })
}

#[test]
fn a_calm_workload_is_copied_first_and_the_pause_is_told() {
    let choice = outlook(10 * GIB, 100 * MIB, Some(MIB)).choose();
    assert_eq!(choice.next, Next::Copy);
    // 102 s for all, 102 MiB changed meanwhile, then 1 MiB.
    assert_eq!(choice.rounds, 3);
    assert_eq!(choice.copying.as_secs(), 103);
    assert!(choice.pause < Duration::from_millis(100), "{}", choice.why);
    assert!(
        choice
            .why
            .starts_with("copy first: 10.0 GiB in all, 100.0 MiB/s copied")
    );
}

#[test]
fn a_short_pause_is_told_once_a_changeset_was_sent_and_a_long_one_before() {
    for dirty in [None, Some(1)] {
        let mut outlook = outlook(GIB, 100 * MIB, dirty);
        let why = outlook.clone().choose().why;
        assert!(
            why.contains("then a pause that is not measured yet"),
            "{why}"
        );
        outlook.whole = Some(Duration::from_secs(10));
        outlook.last = Some(Changeset {
            bytes: Bytes(MIB),
            took: Duration::from_millis(30),
        });
        let why = outlook.choose().why;
        assert!(why.contains("a pause of about"), "{why}");
    }
    let why = outlook(100 * GIB, 100 * MIB, Some(200 * MIB)).choose().why;
    assert!(why.contains("a pause of about"), "{why}");
}

#[test]
fn a_workload_that_writes_faster_than_the_copy_is_switched_first() {
    let choice = outlook(100 * GIB, 100 * MIB, Some(200 * MIB)).choose();
    assert_eq!(choice.next, Next::SwitchFirst, "{}", choice.why);
    assert!(choice.why.contains("do not get small"), "{}", choice.why);
}

#[test]
fn where_switching_first_cannot_be_done_it_copies_and_says_why() {
    let mut outlook = outlook(100 * GIB, 100 * MIB, Some(200 * MIB));
    outlook.obstacle = Some("the disk fails".into());
    let choice = outlook.clone().choose();
    assert_eq!(choice.next, Next::Copy);
    assert!(
        choice.why.ends_with("cannot be done: the disk fails"),
        "{}",
        choice.why
    );
    outlook.word = Some(Way::SwitchFirst);
    let choice = outlook.choose();
    assert_eq!(choice.next, Next::Copy);
    assert!(
        choice.why.contains("an operator said to switch first"),
        "{}",
        choice.why
    );
}

#[test]
fn a_forecast_in_which_copying_would_not_end_but_each_byte_goes_once_switches_first() {
    let mut outlook = outlook(12 * GIB, 100 * MIB, Some(50 * MIB));
    outlook.deadline = within(180);
    let choice = outlook.clone().choose();
    assert_eq!(choice.next, Next::SwitchFirst, "{}", choice.why);
    assert!(choice.why.contains("`too-hot`"), "{}", choice.why);
    outlook.deadline = within(60);
    let choice = outlook.clone().choose();
    assert_eq!(choice.next, Next::Copy);
    assert!(choice.why.contains("neither way"), "{}", choice.why);
    outlook.deadline = within(3600);
    assert_eq!(outlook.choose().next, Next::Copy);
}

#[test]
fn what_was_copied_counts_for_copying_and_not_as_whole_after_a_switch() {
    // 9 of 10 GiB are there: 10 s of copying are left, and 6 rounds for what changes; the source reads 102 s for all.
    let mut late = outlook(10 * GIB, 100 * MIB, Some(60 * MIB));
    late.copied = Bytes(9 * GIB);
    late.deadline = within(15);
    assert!(!late.is_late());
    assert_eq!(late.choose().next, Next::Copy);
    let mut late = outlook(10 * GIB, 100 * MIB, Some(95 * MIB));
    late.copied = Bytes(GIB);
    late.deadline = within(110);
    assert!(late.is_late());
    let choice = late.choose();
    assert_eq!(choice.next, Next::SwitchFirst);
    let how = "switch first, with what was copied so far: ";
    assert!(choice.why.starts_with(how), "{}", choice.why);
}

#[test]
fn rounds_in_advance_say_nothing_of_the_rate_of_those_that_follow() {
    let mut measured = Measured::default();
    let slow = |bytes, seconds| Changeset {
        bytes: Bytes(bytes),
        took: Duration::from_secs(seconds),
    };
    measured.note(UnixMillis(1_000_000), slow(16 * GIB, 1000));
    measured.note(UnixMillis(1_120_000), slow(GIB, 60));
    assert_eq!(measured.copy(), Some(rate(16 * GIB / 1000)));
    measured.hurry();
    assert_eq!((measured.copy(), measured.last), (None, None));
    let assumed = rate(GIB);
    assert_eq!(measured.overhead(&assumed), Duration::ZERO);
    assert!(measured.whole.is_some() && measured.dirty().is_some());
}

#[test]
fn an_operators_word_wins() {
    let mut outlook = outlook(GIB, 100 * MIB, Some(200 * MIB));
    outlook.word = Some(Way::CopyFirst);
    assert_eq!(outlook.clone().choose().next, Next::Copy);
    outlook.word = Some(Way::SwitchFirst);
    outlook.dirty = None;
    assert_eq!(outlook.choose().next, Next::SwitchFirst);
}

#[test]
fn a_round_that_found_little_or_no_less_than_the_one_before_is_the_last() {
    let mut outlook = outlook(GIB, 100 * MIB, Some(10 * MIB));
    (outlook.rounds, outlook.whole) = (2, Some(Duration::from_secs(10)));
    let last = |bytes| {
        Some(Changeset {
            bytes: Bytes(bytes),
            took: Duration::from_secs(1),
        })
    };
    outlook.last = last(100 * MIB);
    assert_eq!(outlook.clone().choose().next, Next::Copy);
    outlook.before = Some(Bytes(110 * MIB));
    assert_eq!(outlook.clone().choose().next, Next::Pause);
    (outlook.before, outlook.last) = (None, last(16 * MIB));
    assert_eq!(outlook.clone().choose().next, Next::Pause);
    (outlook.rounds, outlook.last) = (8, last(100 * MIB));
    assert_eq!(outlook.choose().next, Next::Pause);
}

#[test]
fn it_changes_on_the_way_when_the_workload_wakes_up() {
    let mut measured = Measured::default();
    let ask = |measured: &Measured, rounds| {
        let mut asked = outlook(10 * GIB, 100 * MIB, None);
        let copy = measured.copy().unwrap_or(asked.copy.clone());
        asked.rounds = rounds;
        (asked.whole, asked.last) = (measured.whole, measured.last);
        (asked.dirty, asked.overhead) = (measured.dirty(), measured.overhead(&copy));
        asked.copy = copy;
        asked.choose()
    };
    assert_eq!(ask(&measured, 0).next, Next::Copy);
    let round = |bytes, seconds| Changeset {
        bytes: Bytes(bytes),
        took: Duration::from_secs(seconds),
    };
    measured.note(UnixMillis(100_000), round(10 * GIB, 100));
    assert_eq!(ask(&measured, 1).next, Next::Copy);
    // Everything was written anew within the 100 s of the whole copy: as fast as it is copied.
    measured.note(UnixMillis(200_000), round(10 * GIB, 100));
    let choice = ask(&measured, 2);
    assert_eq!(choice.next, Next::SwitchFirst, "{}", choice.why);
}

#[test]
fn what_a_round_measures() {
    let mut measured = Measured::default();
    let round = |bytes, ms| Changeset {
        bytes: Bytes(bytes),
        took: Duration::from_millis(ms),
    };
    measured.note(UnixMillis(10_000), round(800 * MIB, 8_000));
    assert_eq!(measured.dirty(), None);
    assert_eq!(measured.copy().unwrap().bytes, Bytes(100 * MIB));
    measured.note(UnixMillis(12_000), round(80 * MIB, 2_000));
    let copy = measured.copy().unwrap();
    assert_eq!(
        copy.bytes,
        Bytes(100 * MIB),
        "the large round tells the rate"
    );
    assert_eq!(
        measured.dirty().unwrap().bytes,
        Bytes(10 * MIB),
        "80 MiB in the 8 s between"
    );
    assert_eq!(measured.overhead(&copy), Duration::from_millis(1_200));
    measured.restart();
    measured.note(UnixMillis(90_000), round(800 * MIB, 9_000));
    assert_eq!(
        measured.dirty(),
        None,
        "a whole round after a restart is no changeset"
    );
}

prop_compose! {
    fn any_outlook()(
        size in 0u64..1 << 50, copy in 0u64..1 << 40, dirty in proptest::option::of(0u64..1 << 40),
        rounds in 0u32..12, last in proptest::option::of((0u64..1 << 50, 0u64..1 << 40)),
        before in proptest::option::of(0u64..1 << 50), whole in proptest::option::of(0u64..1 << 40),
        overhead in 0u64..1 << 30, left in proptest::option::of(0u64..1 << 30),
        possible: bool, word in 0usize..3,
    ) -> Outlook {
        let mut outlook = outlook(size, copy, dirty);
        outlook.rounds = rounds;
        outlook.whole = whole.map(Duration::from_millis);
        outlook.last = last.filter(|_| whole.is_some()).map(|(bytes, took)| Changeset {
            bytes: Bytes(bytes), took: Duration::from_millis(took),
        });
        outlook.before = before.map(Bytes);
        outlook.overhead = Duration::from_millis(overhead);
        outlook.deadline = left.and_then(within);
        outlook.obstacle = (!possible).then(|| "no".into());
        outlook.word = [None, Some(Way::CopyFirst), Some(Way::SwitchFirst)][word];
        outlook
    }
}

proptest! {
    #[test]
    fn it_never_switches_first_where_that_cannot_be_done_or_an_operator_forbade_it(
        outlook in any_outlook()
    ) {
        let forbidden = outlook.obstacle.is_some() || outlook.word == Some(Way::CopyFirst);
        let choice = outlook.choose();
        prop_assert!(!forbidden || choice.next != Next::SwitchFirst, "{}", choice.why);
    }

    #[test]
    fn copying_ends_within_the_rounds_and_a_pause_follows_on_measured_changes(
        outlook in any_outlook()
    ) {
        let (rounds, measured) = (outlook.rounds, outlook.last.is_some());
        let most = outlook.bounds.rounds;
        let choice = outlook.choose();
        prop_assert!(choice.next != Next::Pause || measured);
        prop_assert!(choice.next != Next::Copy || !measured || rounds < most);
        // The whole copy and one changeset are sent however few rounds are left.
        prop_assert!(choice.rounds <= most.saturating_sub(rounds).max(2));
    }

    #[test]
    fn a_slower_workload_is_never_switched_first_when_a_faster_one_is_copied(
        outlook in any_outlook(), less in 0.0..1.0f64
    ) {
        // Before anything was copied; later the observed rounds count too.
        let outlook = Outlook { last: None, before: None, whole: None, deadline: None, word: None, ..outlook };
        let calmer = Outlook {
            dirty: outlook.dirty.as_ref().map(|dirty| rate((dirty.bytes.0 as f64 * less) as u64)),
            ..outlook.clone()
        };
        let faster = outlook.choose();
        if faster.next != Next::SwitchFirst {
            let calmer = calmer.choose();
            prop_assert!(calmer.next != Next::SwitchFirst, "{}\n{}", faster.why, calmer.why);
        }
    }
}
