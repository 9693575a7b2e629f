//! `hognose explain NAME`: a step of the theory computed, checked and drawn.

mod hippo;
mod kalman;
mod look;
mod report;
mod representations;
mod s4_kernel;
mod scan;
mod selection;
mod ssd;
mod ssm;
mod zoh;

use std::io::Write;
use std::time::Instant;

use crate::args::{ExplainArgs, Usage};
use report::Explanation;

/// A step of the theory.
struct Topic {
    name: &'static str,
    about: &'static str,
    explain: fn(&ExplainArgs) -> anyhow::Result<Explanation>,
}

const TOPICS: [Topic; 9] = [
    topic("ssm", "a mass on a spring as a state space model; what selection keeps of linearity", ssm::explain),
    topic("zoh", "from a differential equation to steps: zero-order hold, bilinear, Euler", zoh::explain),
    topic(
        "representations",
        "continuous = recurrent = convolutional, and what each of them costs",
        representations::explain,
    ),
    topic("hippo", "states that remember functions: LegS, LegT, LagT, FouT", hippo::explain),
    topic("s4-kernel", "S4's convolution kernel in three ways; diagonal models", s4_kernel::explain),
    topic("selection", "S6: what Δ does, in a trained model and by itself", selection::explain),
    topic("scan", "sequential, Hillis–Steele, Blelloch and chunked scans; why fusion", scan::explain),
    topic("ssd", "Mamba-2: recurrence = masked linear attention; a model's hidden attention", ssd::explain),
    topic("kalman", "the same model with noise: filter and smoother", kalman::explain),
];

const fn topic(
    name: &'static str,
    about: &'static str,
    explain: fn(&ExplainArgs) -> anyhow::Result<Explanation>,
) -> Topic {
    Topic { name, about, explain }
}

/// The names that look into a model.
const WITH_MODEL: [&str; 2] = ["selection", "ssd"];

pub fn run(args: ExplainArgs) -> anyhow::Result<()> {
    let Some(name) = &args.name else { return list(args.json) };
    let Some(topic) = TOPICS.iter().find(|t| t.name == name) else {
        let known: Vec<&str> = TOPICS.iter().map(|t| t.name).collect();
        return Err(
            Usage(format!("there is nothing to explain named \"{name}\"; there are {}", known.join(", "))).into()
        );
    };
    if (args.model.is_some() || args.text.is_some()) && !WITH_MODEL.contains(&topic.name) {
        let message = format!("--model and --text are for {}; {name} looks into no model", WITH_MODEL.join(" and "));
        return Err(Usage(message).into());
    }
    let begin = Instant::now();
    let explanation = (topic.explain)(&args)?;
    explanation.publish(topic.name, &args.out, args.json, begin)
}

/// What there is.
fn list(json: bool) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    if json {
        let names: serde_json::Map<_, _> = TOPICS.iter().map(|t| (t.name.to_string(), t.about.into())).collect();
        writeln!(out, "{}", serde_json::Value::Object(names))?;
        return Ok(());
    }
    for topic in &TOPICS {
        writeln!(out, "{:<16} {}", topic.name, topic.about)?;
    }
    Ok(())
}
