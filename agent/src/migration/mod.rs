//! The delegator: plan, phases, journal, twin start-up, cut-over, report.
