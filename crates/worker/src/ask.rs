//! Asks Redis until it answers.
//!
//! In:     commands that may be sent twice.
//! Out:    a reply to each: a value, or a refusal that time does not mend.
//! Keeps:  a command with a good reply is not sent again, unless it has to stand behind one that is; the worker shows progress, and a stop ends the asking.
//! Knows:  the client and its error classes. No key, no meaning.
//! Source: docs/store.md 2, 4; docs/supervision.md 3.

use shared::board::Phase;
use store::client::{Client, Command, CommandError, Reply};

use crate::{
    Ended,
    beat::{Beat, Reason},
};

/// A reply as a role sees it: outages are waited for here.
pub type Answer = Result<store::client::Value, CommandError>;

/// Sends all commands; those that met an outage are sent again until they are answered.
///
/// # Errors
/// [`Ended::Stopped`] when the supervisor asked for it before all were answered.
pub fn ask(
    client: &mut Client,
    beat: &mut Beat,
    attempt: &str,
    commands: Vec<Command>,
) -> Result<Vec<Answer>, Ended> {
    let phase = beat.phase_now();
    beat.phase(Phase::Redis);
    let mut answers: Vec<Option<Answer>> = Vec::new();
    answers.resize_with(commands.len(), || None);
    let mut left: Vec<(usize, Command)> = commands.into_iter().enumerate().collect();
    while !left.is_empty() {
        let (places, commands): (Vec<usize>, Vec<Command>) = left.drain(..).unzip();
        let replies: Vec<Reply> = client.run(&commands);
        let mut outage = None;
        for ((place, command), reply) in places.into_iter().zip(commands).zip(replies) {
            match reply {
                Err(error) if error.is_outage() => {
                    left.push((place, command));
                    outage = Some(error);
                }
                _ if left.iter().any(|(_, before)| command.follows(before)) => {
                    left.push((place, command));
                }
                answer => answers[place] = Some(answer),
            }
        }
        match outage {
            Some(error) => beat.failed(Reason::Redis, attempt, &error)?,
            None => beat.worked(Reason::Redis),
        }
    }
    beat.phase(phase);
    Ok(answers.into_iter().flatten().collect())
}

/// As [`ask`], for commands that only a broken store refuses: a refusal is said and the commands are sent again.
///
/// # Errors
/// [`Ended::Stopped`].
pub fn insist(
    client: &mut Client,
    beat: &mut Beat,
    attempt: &str,
    commands: &[Command],
) -> Result<Vec<store::client::Value>, Ended> {
    loop {
        let answers = ask(client, beat, attempt, commands.to_vec())?;
        match answers.into_iter().collect::<Result<Vec<_>, _>>() {
            Ok(values) => return Ok(values),
            Err(error) => beat.failed(Reason::Redis, attempt, &error)?,
        }
    }
}
