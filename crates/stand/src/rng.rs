//! Numbers that look random and are the same for the same seed.
//!
//! In:     a seed.
//! Out:    numbers (splitmix64).
//! Keeps:  the same seed gives the same numbers on every machine.
//! Knows:  nothing else. Pure.
//! Source: docs/house.md 13.

use std::ops::RangeInclusive;

/// A generator of pseudo-random numbers.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// A generator that starts from a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`; zero when there is none.
    pub fn below(&mut self, bound: u64) -> u64 {
        let product = u128::from(self.bits()) * u128::from(bound);
        u64::try_from(product >> 64).unwrap_or(0)
    }

    /// A number of a range, each as likely.
    pub fn within(&mut self, range: &RangeInclusive<u64>) -> u64 {
        let width = range.end().saturating_sub(*range.start());
        range.start() + self.below(width.saturating_add(1))
    }

    /// A number of a range, each power of two as likely: mostly small ones, now and then a large one.
    pub fn skewed(&mut self, range: &RangeInclusive<u64>) -> u64 {
        let width = range.end().saturating_sub(*range.start());
        let magnitude = self.below(u64::from(u64::BITS - width.leading_zeros()) + 1);
        let reach = width.min((1_u64 << magnitude.min(63)) - 1);
        range.start() + self.below(reach + 1)
    }

    /// True in `permille` of 1,000 cases.
    pub fn chance(&mut self, permille: u64) -> bool {
        self.below(1_000) < permille
    }

    /// One of several; none of none.
    pub fn choose<'c, T>(&mut self, choices: &'c [T]) -> Option<&'c T> {
        let index = self.below(u64::try_from(choices.len()).unwrap_or(u64::MAX));
        choices.get(usize::try_from(index).unwrap_or(usize::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_numbers_are_those_of_splitmix64() {
        let mut rng = Rng::new(1_234_567);
        assert_eq!(
            [rng.bits(), rng.bits()],
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]
        );
    }

    #[test]
    fn numbers_stay_in_range_and_reach_its_ends() {
        let mut rng = Rng::new(1);
        let drawn: Vec<u64> = (0..1_000).map(|_| rng.within(&(3..=5))).collect();
        assert!(
            [3, 4, 5].iter().all(|number| drawn.contains(number))
                && drawn.iter().all(|number| (3..=5).contains(number))
        );
        let skewed: Vec<u64> = (0..2_000).map(|_| rng.skewed(&(1..=1_000))).collect();
        assert!(skewed.iter().all(|number| (1..=1_000).contains(number)));
        assert!(skewed.iter().filter(|&&number| number <= 10).count() > 500);
        assert!(skewed.iter().any(|&number| number > 900));
        assert_eq!(rng.skewed(&(7..=7)), 7);
        assert_eq!(rng.choose::<u8>(&[]), None);
        assert!(!rng.chance(0) && rng.chance(1_000));
    }
}
