//! The loop of `daxvm top`: asks, draws, and listens to keys.

use std::io::{self, IsTerminal};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

use super::Snapshot;
use super::view::Screen;
use crate::api::ClientError;

/// How long a signal can wait to be noticed.
const ATTENTION: Duration = Duration::from_millis(200);

/// Why nothing can be shown. The message names what to do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TopError {
    /// There is no terminal.
    #[error("daxvm top needs a terminal for its input and output: use `daxvm top --once` in scripts")]
    NoTerminal,
    /// The VM does not answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The terminal cannot be used.
    #[error("Cannot use the terminal: use `daxvm top --once`")]
    Terminal(#[from] io::Error),
}

/// How it came to its end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The user wanted it.
    Quit,
    /// The VM has gone.
    Gone,
}

/// Shows a VM until the user has seen enough, or the VM has gone. The terminal is given back in any case.
///
/// # Errors
/// See [`TopError`].
pub(crate) fn run(socket: &Path, interval: Duration) -> Result<End, TopError> {
    if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        return Err(TopError::NoTerminal);
    }
    // Before the screen is changed, so that what is wrong can be read.
    let now = Snapshot::fetch(socket)?;
    let ended = Arc::new(AtomicBool::new(false));
    for signal in [SIGHUP, SIGINT, SIGQUIT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&ended))?;
    }
    let screen = Screen { now, before: None, share: 0, has_colors: has_colors() };
    // Gives the terminal back when a thread panics, too.
    let _restored = Restored;
    let mut terminal = ratatui::try_init()?;
    show(&mut terminal, screen, socket, interval, &ended)
}

struct Restored;

impl Drop for Restored {
    fn drop(&mut self) {
        // A terminal that has gone needs no restoring.
        let _ = ratatui::try_restore();
    }
}

fn show(
    terminal: &mut DefaultTerminal,
    mut screen: Screen,
    socket: &Path,
    interval: Duration,
    ended: &AtomicBool,
) -> Result<End, TopError> {
    let mut next = Instant::now() + interval;
    loop {
        terminal.draw(|frame| screen.draw(frame))?;
        loop {
            if ended.load(Ordering::Relaxed) {
                return Ok(End::Quit);
            }
            let left = next.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            if event::poll(left.min(ATTENTION))? {
                match event::read()? {
                    Event::Key(key) if key.kind == KeyEventKind::Press => match action(key) {
                        Some(Action::Quit) => return Ok(End::Quit),
                        Some(Action::Turn(by)) => {
                            let shares = screen.now.window.shares.len().max(1);
                            screen.share = (screen.share + shares).saturating_add_signed(by) % shares;
                        }
                        None => continue,
                    },
                    Event::Resize(..) => {}
                    _ => continue,
                }
                terminal.draw(|frame| screen.draw(frame))?;
            }
        }
        match Snapshot::fetch(socket) {
            Ok(now) => screen.before = Some(std::mem::replace(&mut screen.now, now)),
            Err(ClientError::NotThere { .. } | ClientError::Broken { .. }) => return Ok(End::Gone),
            Err(error) => return Err(error.into()),
        }
        next = Instant::now() + interval;
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Action {
    Quit,
    /// To another share, so many further on.
    Turn(isize),
}

fn action(key: KeyEvent) -> Option<Action> {
    match key.code {
        KeyCode::Char('q') | KeyCode::Esc => Some(Action::Quit),
        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => Some(Action::Quit),
        KeyCode::Tab | KeyCode::Right | KeyCode::Down => Some(Action::Turn(1)),
        KeyCode::BackTab | KeyCode::Left | KeyCode::Up => Some(Action::Turn(-1)),
        _ => None,
    }
}

/// Whether colours are wanted (no-color.org) and possible.
fn has_colors() -> bool {
    let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    !is_set("NO_COLOR") && std::env::var_os("TERM").is_some_and(|term| term != "dumb")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_do_what_the_last_line_says() {
        let key = |code, modifiers| action(KeyEvent::new(code, modifiers));
        assert_eq!(key(KeyCode::Char('q'), KeyModifiers::NONE), Some(Action::Quit));
        assert_eq!(key(KeyCode::Char('c'), KeyModifiers::CONTROL), Some(Action::Quit));
        assert_eq!(key(KeyCode::Char('c'), KeyModifiers::NONE), None);
        assert_eq!(key(KeyCode::Tab, KeyModifiers::NONE), Some(Action::Turn(1)));
        assert_eq!(key(KeyCode::BackTab, KeyModifiers::SHIFT), Some(Action::Turn(-1)));
    }
}
