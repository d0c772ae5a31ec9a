//! Which case is started when: within a budget of memory and CPUs, in the order of the file, with smaller cases going
//! first where a larger one has to wait. Pure: nothing here starts anything.

use std::collections::{BTreeMap, VecDeque};

/// How often smaller cases may overtake one that waits for room, before all wait for it.
const OVERTAKING: u32 = 8;

/// What a case takes while it runs, or what all together may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resources {
    /// vCPUs.
    pub cpus: u32,
    /// Bytes of memory.
    pub memory: u64,
}

impl Resources {
    fn holds(self, cost: Resources) -> bool {
        cost.cpus <= self.cpus && cost.memory <= self.memory
    }
}

/// Decides what is started.
///
/// Memory is a hard limit. vCPUs are threads that can take turns, so a case that has more of them than the budget counts
/// as one that takes all of it: it runs alone, and `--jobs 1` runs one case after another.
#[derive(Debug)]
pub(super) struct Schedule {
    free: Resources,
    costs: Vec<Resources>,
    waiting: VecDeque<usize>,
    running: BTreeMap<usize, Resources>,
    /// How often the first that waits was overtaken.
    overtaken: u32,
}

impl Schedule {
    /// A schedule for cases of these costs; they are known by their places from here on.
    ///
    /// # Errors
    /// The case that does not fit even alone.
    pub(super) fn new(budget: Resources, costs: &[Resources]) -> Result<Schedule, usize> {
        let cost = |cost: &Resources| Resources { cpus: cost.cpus.min(budget.cpus), ..*cost };
        let costs: Vec<_> = costs.iter().map(cost).collect();
        match costs.iter().position(|cost| !budget.holds(*cost)) {
            Some(case) => Err(case),
            None => Ok(Schedule {
                free: budget,
                waiting: (0..costs.len()).collect(),
                costs,
                running: BTreeMap::new(),
                overtaken: 0,
            }),
        }
    }

    /// The case to start now, which counts as running from here on; none if all has to wait.
    pub(super) fn start(&mut self) -> Option<usize> {
        let within = if self.overtaken < OVERTAKING { self.waiting.len() } else { 1 };
        let place = self.waiting.iter().take(within).position(|case| self.free.holds(self.costs[*case]))?;
        self.overtaken = if place == 0 { 0 } else { self.overtaken + 1 };
        let case = self.waiting.remove(place)?;
        let cost = self.costs[case];
        self.free.cpus -= cost.cpus;
        self.free.memory -= cost.memory;
        self.running.insert(case, cost);
        Some(case)
    }

    /// A case has ended.
    pub(super) fn end(&mut self, case: usize) {
        if let Some(cost) = self.running.remove(&case) {
            self.free.cpus += cost.cpus;
            self.free.memory += cost.memory;
        }
    }

    /// A case has ended and is to be run again, before all others.
    pub(super) fn again(&mut self, case: usize) {
        self.end(case);
        self.waiting.push_front(case);
        self.overtaken = 0;
    }

    /// Nothing more is started; returns what has not been.
    pub(super) fn give_up(&mut self) -> Vec<usize> {
        self.waiting.drain(..).collect()
    }

    /// Whether nothing runs and nothing waits.
    pub(super) fn is_done(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn costs(list: &[(u32, u64)]) -> Vec<Resources> {
        list.iter().map(|&(cpus, memory)| Resources { cpus, memory }).collect()
    }

    fn started(schedule: &mut Schedule) -> Vec<usize> {
        std::iter::from_fn(|| schedule.start()).collect()
    }

    #[test]
    fn small_cases_go_first_where_a_large_one_waits_but_not_for_ever() {
        let mut list = vec![(1, 6), (1, 10)];
        list.resize(22, (1, 1));
        let mut schedule = Schedule::new(Resources { cpus: 8, memory: 10 }, &costs(&list)).unwrap();
        assert_eq!(started(&mut schedule), [0, 2, 3, 4, 5]);
        for case in [2, 3, 4, 5] {
            schedule.end(case);
        }
        assert_eq!(started(&mut schedule), [6, 7, 8, 9]);
        for case in [6, 7, 8, 9] {
            schedule.end(case);
        }
        assert!(started(&mut schedule).is_empty());
        schedule.end(0);
        assert_eq!(started(&mut schedule), [1]);
    }

    #[test]
    fn more_cpus_than_there_are_mean_alone_and_too_much_memory_means_never() {
        let budget = Resources { cpus: 2, memory: 10 };
        let mut schedule = Schedule::new(budget, &costs(&[(1, 1), (4, 1), (1, 1)])).unwrap();
        assert_eq!(started(&mut schedule), [0, 2]);
        schedule.end(0);
        assert!(started(&mut schedule).is_empty());
        schedule.end(2);
        assert_eq!(started(&mut schedule), [1]);
        assert_eq!(Schedule::new(budget, &costs(&[(1, 1), (1, 11)])).unwrap_err(), 1);
    }

    #[test]
    fn nothing_is_started_after_giving_up() {
        let mut schedule = Schedule::new(Resources { cpus: 1, memory: 1 }, &costs(&[(1, 1); 3])).unwrap();
        assert_eq!(started(&mut schedule), [0]);
        assert_eq!(schedule.give_up(), [1, 2]);
        assert!(!schedule.is_done());
        schedule.end(0);
        assert!(schedule.is_done() && schedule.start().is_none());
    }

    proptest! {
        /// Runs all cases, with ends and repetitions in an arbitrary order.
        #[test]
        fn the_budget_is_kept_and_every_case_runs(
            cpus in 1..6_u32,
            list in prop::collection::vec((1..9_u32, 0..=100_u64), 1..40),
            choices in prop::collection::vec((any::<prop::sample::Index>(), prop::bool::weighted(0.2)), 200),
        ) {
            let budget = Resources { cpus, memory: 100 };
            let costs = costs(&list);
            let mut schedule = Schedule::new(budget, &costs).unwrap();
            let mut ended = vec![0; list.len()];
            let mut running = Vec::new();
            let mut choices = choices.into_iter();
            while !schedule.is_done() {
                running.extend(started(&mut schedule));
                // Something always runs until all is done.
                prop_assert!(!running.is_empty());
                let memory: u64 = running.iter().map(|&case: &usize| costs[case].memory).sum();
                let cpus: u32 = running.iter().map(|&case| costs[case].cpus).sum();
                prop_assert!(memory <= budget.memory);
                prop_assert!(cpus <= budget.cpus || running.len() == 1, "{running:?}");
                let choice = choices.next().map(|(index, again)| (index.index(running.len()), again));
                let (index, again) = choice.unwrap_or((0, false));
                let case = running.swap_remove(index);
                if again {
                    schedule.again(case);
                } else {
                    ended[case] += 1;
                    schedule.end(case);
                }
            }
            prop_assert!(ended.iter().all(|&count| count == 1));
            prop_assert_eq!(schedule.free, budget);
            prop_assert!(schedule.start().is_none());
        }
    }
}
