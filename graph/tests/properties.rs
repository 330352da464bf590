//! What holds for every graph and placement, tried on random ones.

#[path = "support/random.rs"]
mod random;

use graph::{
    Absorb, Rates, Traffic,
    assign::{AssignError, Assignment, Facts, Reason, Rules, Stage, assign, assign_watched},
    memory, split, transfers, validate,
};
use proptest::prelude::*;
use random::{Mix, recipes};

fn rules() -> impl Strategy<Value = Rules> {
    let auto = || Absorb::Auto(Rates { bus: 1e9, memory: vec![1e11, 1e10] });
    let absorb = (0usize..3).prop_map(move |pick| [Absorb::Owner, Absorb::Layer, auto()][pick].clone());
    (absorb, prop::bool::weighted(0.8), prop::bool::weighted(0.1))
        .prop_map(|(absorb, ownership_check, strict)| Rules { absorb, ownership_check, strict })
}

/// Every stage on these facts, with the validator after each.
fn whole(facts: &Facts, rules: &Rules) -> Result<(), TestCaseError> {
    let holds = |checked: Result<(), validate::Violation>| {
        checked.map_err(|violation| TestCaseError::fail(violation.to_string()))
    };
    holds(validate::facts(facts))?;
    let mut between = Ok(());
    let assigned = assign_watched(facts, rules, &mut |stage, owners, reasons| {
        let checked = validate::draft(facts, rules, owners, reasons);
        let checked = checked.map_err(|violation| TestCaseError::fail(format!("{stage:?}: {violation}")));
        between = between.clone().and(checked);
    });
    between?;
    let assignment = match assigned {
        Ok(assignment) => assignment,
        Err(AssignError::Nobody { node }) => {
            prop_assert_eq!(facts.nodes[node].runs_on.iter().count(), 0);
            return Ok(());
        }
        Err(AssignError::Store { node, device } | AssignError::Strict { node, device }) => {
            prop_assert!(!facts.nodes[node].runs_on.contains(device));
            return Ok(());
        }
    };
    holds(validate::owners(facts, rules, &assignment))?;
    let owners = &assignment.owners;
    let (order, mut splits) = split(facts, owners);
    holds(validate::splits(facts, owners, &order, &splits))?;
    let moved = transfers(facts, owners, &order, &mut splits);
    holds(validate::transfers(facts, &assignment, &order, &splits, &moved))?;
    holds(validate::ownership(rules, facts, &assignment, &moved))?;
    let planned = memory(facts, owners, &order, &splits, &moved);
    holds(validate::memory(facts, owners, &order, &splits, &moved, &planned))?;
    if rules.ownership_check && assignment.fall_backs.is_empty() {
        let states = moved.iter().filter(|transfer| transfer.kind == graph::StorageKind::State);
        prop_assert_eq!(states.count(), 0, "C5");
    }
    Ok(())
}

fn everything(facts: &Facts, owners: &[usize]) -> Traffic {
    let (order, mut splits) = split(facts, owners);
    let mut sum = Traffic::default();
    for transfer in transfers(facts, owners, &order, &mut splits) {
        sum += Traffic::of(transfer.kind, transfer.bytes);
    }
    sum
}

fn crossing(facts: &Facts, owners: &[usize]) -> u64 {
    let Traffic { activation, input, .. } = everything(facts, owners);
    activation + input
}

/// Nodes that no weight, user or state had a say in.
fn open(assignment: &Assignment) -> Vec<usize> {
    (0..assignment.owners.len()).filter(|&node| is_open(assignment.reasons[node])).collect()
}

fn is_open(reason: Reason) -> bool {
    matches!(reason, Reason::ExpandedDown(_) | Reason::ExpandedUp(_) | Reason::FewerBytes | Reason::Home)
}

/// These owners, with the open nodes on every side that two devices allow.
fn all_sides(owners: &[usize], open: &[usize]) -> impl Iterator<Item = Vec<usize>> {
    (0..1u32 << open.len()).map(move |sides| {
        let mut owners = owners.to_vec();
        for (bit, &node) in open.iter().enumerate() {
            owners[node] = (sides >> bit & 1) as usize;
        }
        owners
    })
}

/// The fewest runs of one owner of all orders, by trying all sets of nodes that can be done.
fn fewest_splits(facts: &Facts, owners: &[usize]) -> usize {
    let count = facts.nodes.len();
    let mut best = vec![vec![usize::MAX; facts.devices]; 1 << count];
    best[0] = vec![0; facts.devices];
    for done in 0..1usize << count {
        for node in (0..count).filter(|node| done >> node & 1 == 0) {
            if !facts.nodes[node].after.iter().all(|before| done >> before & 1 == 1) {
                continue;
            }
            for last in 0..facts.devices {
                if best[done][last] == usize::MAX || done > 0 && best[done][last] == 0 {
                    continue;
                }
                let cost = best[done][last] + usize::from(done == 0 || last != owners[node]);
                let next = &mut best[done | 1 << node][owners[node]];
                *next = cost.min(*next);
            }
        }
    }
    best[(1 << count) - 1].iter().copied().min().unwrap_or(0)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, ..ProptestConfig::default() })]

    /// C5 and all that the validator knows.
    #[test]
    fn every_plan_is_valid(
        recipes in recipes(Mix { devices: (1, 4), nodes: 24, lacks: 6, states: 3 }),
        rules in rules(),
    ) {
        whole(&recipes.facts(), &rules)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, ..ProptestConfig::default() })]

    /// Between two devices, no other place for the open nodes moves fewer bytes.
    #[test]
    fn borders_are_exact_between_two(
        recipes in recipes(Mix { devices: (2, 2), nodes: 12, lacks: 0, states: 1 }),
    ) {
        let facts = recipes.facts();
        let rules = Rules { absorb: Absorb::Owner, ownership_check: true, strict: false };
        let assignment = assign(&facts, &rules).expect("assignable");
        let open = open(&assignment);
        let found = crossing(&facts, &assignment.owners);
        for owners in all_sides(&assignment.owners, &open) {
            let other = crossing(&facts, &owners);
            prop_assert!(found <= other, "{found} bytes cross, {other} with {owners:?}");
        }
    }

    /// The same where a device cannot run all: no place of open nodes that can run moves fewer bytes; a node has fallen
    /// back where it was placed, or where, and only where, that costs bytes; and fall-backs cost what crosses more.
    #[test]
    fn what_cannot_run_is_exact_between_two(
        recipes in recipes(Mix { devices: (2, 2), nodes: 11, lacks: 6, states: 1 }),
    ) {
        let facts = recipes.facts();
        let rules = Rules { absorb: Absorb::Owner, ownership_check: true, strict: false };
        let (mut wanted, mut reasons) = (Vec::new(), Vec::new());
        let assigned = assign_watched(&facts, &rules, &mut |stage, owners, said| {
            if stage == Stage::Settle {
                wanted = owners.iter().map(|owner| owner.expect("settled")).collect();
                reasons = said.to_vec();
            }
        });
        let Ok(assignment) = assigned else { return Ok(()) };
        let placed = &assignment.owners;
        let open: Vec<usize> = (0..placed.len()).filter(|&node| is_open(reasons[node])).collect();
        // Everything at all, states too: those who had a say take what they read with them.
        let all = |owners: &[usize]| everything(&facts, owners).total() as i64;
        let told: i64 = assignment.fall_backs.iter().map(|fall_back| fall_back.bytes).sum();
        prop_assert_eq!(told, all(placed) - all(&wanted));

        let (mut fewest, mut fewest_able) = (u64::MAX, u64::MAX);
        for owners in all_sides(placed, &open) {
            let bytes = crossing(&facts, &owners);
            fewest = fewest.min(bytes);
            if open.iter().all(|&node| facts.nodes[node].runs_on.contains(owners[node])) {
                fewest_able = fewest_able.min(bytes);
            }
        }
        prop_assert_eq!(crossing(&facts, placed), fewest_able);
        // With what had a say where it was to be, an open node has fallen back if, and only if, that costs bytes.
        let had_a_say = |node: &usize| !is_open(reasons[*node]) && placed[*node] != wanted[*node];
        if !(0..placed.len()).any(|node| had_a_say(&node)) {
            prop_assert_eq!(!assignment.fall_backs.is_empty(), fewest_able > fewest);
        }
        let strict = assign(&facts, &Rules { strict: true, ..rules });
        prop_assert_eq!(strict.is_ok(), assignment.fall_backs.is_empty());
    }

    /// No order of the same owners has fewer splits: exact between two devices.
    #[test]
    fn splits_are_fewest_between_two(
        recipes in recipes(Mix { devices: (2, 2), nodes: 11, lacks: 0, states: 1 }),
    ) {
        let facts = recipes.facts();
        let owners: Vec<usize> = facts.nodes.iter().map(|node| node.home.expect("a home")).collect();
        prop_assert_eq!(split(&facts, &owners).1.len(), fewest_splits(&facts, &owners));
    }

    /// With three devices too, in graphs so small that every way to begin is followed.
    #[test]
    fn splits_are_fewest_between_three(
        recipes in recipes(Mix { devices: (3, 3), nodes: 10, lacks: 0, states: 1 }),
    ) {
        let facts = recipes.facts();
        let owners: Vec<usize> = facts.nodes.iter().map(|node| node.home.expect("a home")).collect();
        prop_assert_eq!(split(&facts, &owners).1.len(), fewest_splits(&facts, &owners));
    }
}
