//! Schedules and wake-up. Nothing lives here yet: the border is fixed so that later work has a place.
