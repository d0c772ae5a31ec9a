//! What a decision costs with 1,000 rules. The target is 2 microseconds.

mod thousand_rules;

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use devices::virtio::fs::policy::Policy;

fn decide(c: &mut Criterion) {
    let files = thousand_rules::files();
    for (name, policy) in [
        ("auto", Policy::Auto),
        ("1000 mixed rules", thousand_rules::mixed()),
        ("1000 rules without paths", thousand_rules::without_paths()),
        ("1000 globs for one extension", thousand_rules::alike_globs()),
    ] {
        let mut files = files.iter().cycle();
        c.bench_function(name, |b| {
            b.iter(|| {
                let facts = files.next().expect("a cycle has no end");
                policy.decide(black_box(facts), black_box(None))
            });
        });
    }
    // The dearest question: the guest has what the rules would not give it, so that all that is near is looked at.
    let policy = thousand_rules::mixed();
    let mut others = files.iter().map(|facts| (facts, !policy.decide(facts, None).dax)).cycle();
    c.bench_function("1000 mixed rules, against what the guest has", |b| {
        b.iter(|| {
            let (facts, current) = others.next().expect("a cycle has no end");
            policy.decide(black_box(facts), black_box(Some(current)))
        });
    });
}

criterion_group!(benches, decide);
criterion_main!(benches);
