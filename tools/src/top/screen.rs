//! The live view on a terminal.

use core::time::Duration;
use std::io;
use std::sync::mpsc::Receiver;
use std::sync::mpsc::Sender;
use std::sync::mpsc::channel;
use std::thread;

use anyhow::Context;
use nix::sys::signal::SigSet;
use nix::sys::signal::Signal;
use ratatui::Frame;
use ratatui::crossterm::event;
use ratatui::crossterm::event::Event;
use ratatui::crossterm::event::KeyCode;
use ratatui::crossterm::event::KeyEventKind;
use ratatui::crossterm::event::KeyModifiers;
use ratatui::layout::Alignment;
use ratatui::layout::Constraint;
use ratatui::layout::Layout;
use ratatui::layout::Rect;
use ratatui::style::Modifier;
use ratatui::style::Style;
use ratatui::text::Line;
use ratatui::widgets::Cell;
use ratatui::widgets::Paragraph;
use ratatui::widgets::Row;
use ratatui::widgets::TableState;

use super::Args;
use super::Latest;
use super::feed::Feed;
use super::feed::Learnt;
use super::view;
use super::view::Order;
use super::view::Table;

const KEYS: &str =
    " q quit  space pause  + - pace  s sort  up/down device  o its own or all  c cores  u queues";

/// What happens to the view.
enum Happening {
    Learnt(Box<Learnt>),
    Terminal(Event),
    /// There is no terminal any more, or a signal asks to end.
    End,
}

/// What the operator has chosen.
pub(super) struct View {
    latest: Latest,
    interval: Duration,
    order: Order,
    paused: bool,
    /// The row of the selected device.
    selected: usize,
    /// Whether only its queues and operations are shown.
    only: bool,
    cores: bool,
    queues: bool,
}

/// Shows the view until the operator has had enough.
pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let (happens, happening) = channel();
    // Before there is any other thread, so that the signals come to the one that waits for them.
    watch_signals(happens.clone())?;
    let learns = happens.clone();
    let feed = Feed::start(&args.socket, args.interval, args.timeout, move |learnt| {
        learns.send(Happening::Learnt(Box::new(learnt))).is_ok()
    })?;
    let mut terminal = ratatui::try_init().context("cannot use the terminal")?;
    thread::Builder::new()
        .name("keys".to_owned())
        .spawn(move || watch_terminal(&happens))
        .context("cannot start a thread")?;
    let mut view = View::new(args);
    let ended = show(&mut terminal, &mut view, &feed, &happening);
    ratatui::restore();
    ended.context("cannot write to the terminal")
}

fn show(
    terminal: &mut ratatui::DefaultTerminal,
    view: &mut View,
    feed: &Feed,
    happening: &Receiver<Happening>,
) -> io::Result<()> {
    loop {
        terminal.draw(|frame| view.draw(frame))?;
        // All senders hold on as long as their threads live, and those end with the process.
        match happening.recv() {
            Ok(Happening::Learnt(learnt)) => view.learn(*learnt),
            Ok(Happening::Terminal(event)) => match view.take(&event) {
                Wish::Nothing => {}
                Wish::Pace => feed.every(view.interval),
                Wish::Refresh => feed.now(),
                Wish::Redraw => terminal.clear()?,
                Wish::End => return Ok(()),
            },
            Ok(Happening::End) | Err(_) => return Ok(()),
        }
    }
}

fn watch_signals(happens: Sender<Happening>) -> anyhow::Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block().context("cannot block signals")?;
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            if signals.wait().is_ok() {
                // Nobody listens any more: then the end has come anyway.
                let _ = happens.send(Happening::End);
            }
        })
        .context("cannot start a thread")?;
    Ok(())
}

fn watch_terminal(happens: &Sender<Happening>) {
    loop {
        let next = match event::read() {
            Ok(event) => Happening::Terminal(event),
            Err(_) => Happening::End,
        };
        let last = matches!(next, Happening::End);
        if happens.send(next).is_err() || last {
            return;
        }
    }
}

/// What a key asks of others than the view.
pub(super) enum Wish {
    Nothing,
    Pace,
    Refresh,
    Redraw,
    End,
}

impl View {
    /// The view as the command line asks for it.
    pub(super) fn new(args: &Args) -> View {
        View {
            latest: Latest::new(args),
            interval: args.interval,
            order: args.sort,
            paused: false,
            selected: 0,
            only: true,
            cores: true,
            queues: false,
        }
    }

    /// Takes in what the service says, unless the view is held.
    pub(super) fn learn(&mut self, learnt: Learnt) {
        if !self.paused {
            self.latest.learn(learnt);
        }
    }

    /// Does what a key means for the view; gives what it means for others.
    pub(super) fn take(&mut self, event: &Event) -> Wish {
        let Event::Key(key) = event else {
            return Wish::Nothing;
        };
        if key.kind == KeyEventKind::Release {
            return Wish::Nothing;
        }
        let control = key.modifiers.contains(KeyModifiers::CONTROL);
        match key.code {
            KeyCode::Char('c') if control => return Wish::End,
            KeyCode::Char('l') if control => return Wish::Redraw,
            KeyCode::Char('q') | KeyCode::Esc => return Wish::End,
            KeyCode::Char(' ') => {
                self.paused = !self.paused;
                return Wish::Refresh;
            }
            KeyCode::Char('+') => self.interval = super::longest(self.interval * 2),
            KeyCode::Char('-') => self.interval = super::shortest(self.interval / 2),
            KeyCode::Char('s') => self.order = self.order.next(),
            KeyCode::Char('o') => self.only = !self.only,
            KeyCode::Char('c') => self.cores = !self.cores,
            KeyCode::Char('u') => self.queues = !self.queues,
            KeyCode::Up => self.selected = self.selected.saturating_sub(1),
            KeyCode::Down => self.selected = self.selected.saturating_add(1),
            _ => {}
        }
        if matches!(key.code, KeyCode::Char('+' | '-')) {
            Wish::Pace
        } else {
            Wish::Nothing
        }
    }

    /// Draws everything.
    pub(super) fn draw(&mut self, frame: &mut Frame<'_>) {
        let rates = self.latest.rates();
        let last = rates.devices.len().saturating_sub(1);
        self.selected = self.selected.min(last);
        let only = self.only.then_some(self.selected);
        let tables = view::tables(rates, self.order, only);

        // As many lines as it has, of a fair share at most.
        let shown = 3 + u16::from(self.queues);
        let most = frame.area().height / shown;
        let lines = |wanted: bool, table: &Table| match wanted {
            true => u16::try_from(table.rows.len())
                .unwrap_or(u16::MAX)
                .saturating_add(2)
                .min(most),
            false => 0,
        };
        let [
            status,
            core_area,
            device_area,
            queue_area,
            operation_area,
            keys,
        ] = Layout::vertical([
            Constraint::Length(2),
            Constraint::Length(lines(self.cores, &tables.cores)),
            Constraint::Length(lines(true, &tables.devices)),
            Constraint::Length(lines(self.queues, &tables.queues)),
            Constraint::Min(0),
            Constraint::Length(1),
        ])
        .areas(frame.area());

        self.draw_status(frame, status);
        draw_table(frame, core_area, &tables.cores, None);
        draw_table(frame, device_area, &tables.devices, Some(self.selected));
        draw_table(frame, queue_area, &tables.queues, None);
        draw_table(frame, operation_area, &tables.operations, None);
        let reversed = Style::new().add_modifier(Modifier::REVERSED);
        frame.render_widget(Paragraph::new(KEYS).style(reversed), keys);
    }

    fn draw_status(&self, frame: &mut Frame<'_>, area: Rect) {
        let mut status = self.latest.status();
        status.push_str(&format!(
            "  every {} s, by {}",
            self.interval.as_secs_f64(),
            self.order.name()
        ));
        if self.paused {
            status.push_str(", paused");
        }
        let style = match self.latest.is_silent() {
            true => Style::new().add_modifier(Modifier::BOLD | Modifier::REVERSED),
            false => Style::new().add_modifier(Modifier::BOLD),
        };
        frame.render_widget(Paragraph::new(status).style(style), area);
    }
}

fn draw_table(frame: &mut Frame<'_>, area: Rect, table: &Table, selected: Option<usize>) {
    let align = |word: bool| match word {
        true => Alignment::Left,
        false => Alignment::Right,
    };
    let cells = |texts: Vec<String>| {
        let columns = texts.into_iter().zip(table.columns);
        Row::new(
            columns.map(|(text, column)| Cell::new(Line::from(text).alignment(align(column.word)))),
        )
    };
    let header = table.columns.iter().map(|column| column.name.to_owned());
    let header = cells(header.collect())
        .style(Style::new().add_modifier(Modifier::UNDERLINED | Modifier::BOLD));
    let widths = table.widths().into_iter();
    let widths = widths.map(|width| Constraint::Length(u16::try_from(width).unwrap_or(u16::MAX)));
    let rows = table.rows.iter().cloned().map(cells);
    let widget = ratatui::widgets::Table::new(rows, widths)
        .header(header)
        .column_spacing(2)
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    let mut state = TableState::new().with_selected(selected);
    frame.render_stateful_widget(widget, area, &mut state);
}
