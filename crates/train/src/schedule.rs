//! Learning rates as a function of the step.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// The course of the learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The peak rate to the end.
    Constant,
    /// Half a cosine from the peak to the smallest rate (Loshchilov and Hutter, "SGDR", 2017).
    Cosine,
    /// The peak rate, then a straight line down (warm-up, stable, decay: Hu et al., "MiniCPM", 2024).
    StableDecay,
    /// The peak rate, then down as 1 − √x (Hägele et al., "Scaling laws and compute-optimal training beyond fixed
    /// training durations", 2024).
    StableDecaySqrt,
}

/// A learning rate for each step from 0 on. A plain value that is saved with a checkpoint: where the decay begins may
/// have been decided by the clock.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// The course after the warm-up.
    pub kind: Kind,
    /// The largest learning rate.
    pub peak: f64,
    /// The smallest rate that the decay leads to, as a share of the peak.
    pub min_ratio: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// The step at which the decay begins (at the earliest after the warm-up).
    pub decay_start: u64,
    /// The number of steps; the decay ends here, and the rate stays at its smallest from here on.
    pub steps: u64,
}

impl Schedule {
    /// A schedule over `steps` steps. `decay_fraction` is the share of the steps that the decay of the stable-decay
    /// kinds takes; the other kinds do not look at it.
    pub fn new(kind: Kind, peak: f64, min_ratio: f64, warmup: u64, decay_fraction: f64, steps: u64) -> Self {
        let decay_start = match kind {
            Kind::Constant => steps,
            Kind::Cosine => warmup,
            Kind::StableDecay | Kind::StableDecaySqrt => {
                steps - ((steps as f64 * decay_fraction).round() as u64).min(steps)
            }
        };
        Self { kind, peak, min_ratio, warmup, decay_start: decay_start.max(warmup).min(steps.max(warmup)), steps }
    }

    /// The learning rate of a step, counted from 0. In the warm-up it is `(step + 1) / warmup` of the peak, so that
    /// no step is without effect; in the decay it is at the peak at the first step and would reach the smallest rate
    /// at step `steps`, which is no longer taken.
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.peak * (step + 1) as f64 / self.warmup as f64;
        }
        if self.kind == Kind::Constant || step < self.decay_start {
            return self.peak;
        }
        let length = self.steps.saturating_sub(self.decay_start).max(1) as f64;
        let x = ((step - self.decay_start) as f64 / length).min(1.0);
        let share = match self.kind {
            Kind::Constant => 1.0,
            Kind::Cosine => 0.5 * (1.0 + (PI * x).cos()),
            Kind::StableDecay => 1.0 - x,
            Kind::StableDecaySqrt => 1.0 - x.sqrt(),
        };
        self.peak * (self.min_ratio + (1.0 - self.min_ratio) * share)
    }

    /// The same schedule with its decay begun at `start` and done by `end`, for a run that has to end by the clock.
    /// A place inside the warm-up, or an end before the start, is moved to the next possible one.
    pub fn with_decay(self, start: u64, end: u64) -> Self {
        let start = start.max(self.warmup);
        Self { decay_start: start, steps: end.max(start), ..self }
    }

    /// The same schedule with its decay begun at `start` if that is earlier than planned. The decay keeps its share
    /// of the steps, so the run ends earlier in proportion.
    pub fn with_decay_from(self, start: u64) -> Self {
        if start >= self.decay_start || self.decay_start == 0 {
            return self;
        }
        let share = self.steps as f64 / self.decay_start as f64;
        let start = start.max(self.warmup);
        self.with_decay(start, (start as f64 * share).round() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(left: f64, right: f64) {
        assert!((left - right).abs() < 1e-12 * right.abs().max(1.0), "{left} is not {right}");
    }

    #[test]
    fn warm_up_is_a_line_that_ends_at_the_peak() {
        for kind in [Kind::Constant, Kind::Cosine, Kind::StableDecay, Kind::StableDecaySqrt] {
            let schedule = Schedule::new(kind, 0.5, 0.1, 10, 0.2, 100);
            for step in 0..10 {
                close(schedule.rate(step), 0.05 * (step + 1) as f64);
            }
            close(schedule.rate(10), 0.5);
        }
    }

    #[test]
    fn constant_stays() {
        let schedule = Schedule::new(Kind::Constant, 2.0, 0.0, 0, 0.2, 100);
        assert!((0..1000).all(|step| schedule.rate(step) == 2.0));
    }

    #[test]
    fn cosine_has_its_known_values() {
        let schedule = Schedule::new(Kind::Cosine, 1.0, 0.1, 20, 0.5, 120);
        close(schedule.rate(20), 1.0);
        close(schedule.rate(45), 0.1 + 0.9 * 0.5 * (1.0 + std::f64::consts::FRAC_1_SQRT_2));
        close(schedule.rate(70), 0.55);
        close(schedule.rate(120), 0.1);
        close(schedule.rate(500), 0.1);
        assert!((20..119).all(|step| schedule.rate(step) > schedule.rate(step + 1)));
    }

    #[test]
    fn stable_decay_has_its_known_values() {
        let line = Schedule::new(Kind::StableDecay, 1.0, 0.0, 10, 0.2, 100);
        let root = Schedule::new(Kind::StableDecaySqrt, 1.0, 0.5, 10, 0.2, 100);
        assert!((10..=80).all(|step| line.rate(step) == 1.0 && root.rate(step) == 1.0));
        close(line.rate(85), 0.75);
        close(line.rate(99), 0.05);
        close(line.rate(100), 0.0);
        close(root.rate(85), 0.75);
        close(root.rate(100), 0.5);
    }

    #[test]
    fn the_decay_can_begin_earlier_but_not_later() {
        let schedule = Schedule::new(Kind::StableDecay, 1.0, 0.0, 10, 0.2, 100);
        let earlier = schedule.with_decay_from(40);
        assert_eq!((earlier.decay_start, earlier.steps), (40, 50));
        close(earlier.rate(39), 1.0);
        close(earlier.rate(45), 0.5);
        close(earlier.rate(50), 0.0);
        assert_eq!(schedule.with_decay_from(80), schedule);
        assert_eq!(schedule.with_decay_from(95), schedule);
        assert_eq!(schedule.with_decay_from(0).decay_start, 10);
        let exact = schedule.with_decay(30, 35);
        close(exact.rate(34), 0.2);
        assert_eq!((schedule.with_decay(3, 2).decay_start, schedule.with_decay(3, 2).steps), (10, 10));
    }

    #[test]
    fn odd_sizes_give_finite_rates() {
        for kind in [Kind::Constant, Kind::Cosine, Kind::StableDecay, Kind::StableDecaySqrt] {
            for (warmup, fraction, steps) in [(0, 0.0, 1), (0, 1.0, 1), (5, 0.5, 3), (1, 1.0, 1), (0, 0.0, 0)] {
                let schedule = Schedule::new(kind, 1.0, 0.0, warmup, fraction, steps);
                for step in 0..8 {
                    let rate = schedule.rate(step);
                    assert!((0.0..=1.0).contains(&rate), "{kind:?} {warmup} {fraction} {steps}: {rate} at {step}");
                }
            }
        }
    }

    #[test]
    fn survives_being_saved() {
        let schedule = Schedule::new(Kind::StableDecaySqrt, 3e-4, 0.1, 7, 0.3, 100).with_decay_from(33);
        let json = serde_json::to_string(&schedule).unwrap();
        assert_eq!(serde_json::from_str::<Schedule>(&json).unwrap(), schedule);
    }
}
