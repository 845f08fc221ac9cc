//! Opening a fetching connection: the greeting, and the message that says what it is for.

use super::guard::Guard;
use super::plan::{FetchPlan, Grant};
use super::wire::{Class, Fetch};
use crate::model::ids::Epoch;
use crate::transfer::Options;
use crate::transfer::connection::{self, Incoming, Receiver, Transmitter};
use crate::transfer::engine::engine;
use crate::transfer::hello::{self, HelloError};
use crate::transfer::link::Hop;
use crate::transfer::message::Message;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::Arc;

/// An agreed connection, and what the source answered to the message that opened it.
pub(super) struct Connected {
    pub(super) socket: Arc<TcpStream>,
    pub(super) receiver: Receiver,
    pub(super) transmitter: Transmitter,
    pub(super) answer: Fetch,
}

pub(super) fn connect(
    plan: &FetchPlan,
    grant: &Grant,
    options: &Options,
    open: Fetch,
) -> Result<Connected, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let patience = options.patience;
    let Hop { addr, link_key } = &grant.hop;
    let socket = TcpStream::connect_timeout(addr, patience).map_err(|e| text(&e))?;
    connection::tune(&socket, patience).map_err(|e| text(&e))?;
    let class = if open.is_waited_for() {
        connection::Class::Demand
    } else {
        connection::Class::Background
    };
    connection::mark(&socket, class).map_err(|e| text(&e))?;
    let socket = Arc::new(socket);
    let mut greeter = engine(options.engine).map_err(|e| text(&e))?;
    let key = hello::call(
        greeter.as_mut(),
        socket.as_fd(),
        &plan.plan,
        link_key,
        patience,
    )
    .map_err(|error: HelloError| text(&error))?;
    let (mut receiver, mut transmitter) =
        connection::split(&socket, &key, true, options.engine, patience).map_err(|e| text(&e))?;
    transmitter
        .message(plan.volume, Epoch(0), &Message::Fetch(open))
        .map_err(|e| text(&e))?;
    match receiver.next(Vec::new()).map_err(|e| text(&e))? {
        Incoming::Message(_, _, Message::Fetch(answer)) => Ok(Connected {
            socket,
            receiver,
            transmitter,
            answer,
        }),
        _ => Err("the source answered out of order".to_owned()),
    }
}

pub(super) type Fetching = (Arc<TcpStream>, Receiver, Transmitter, Guard);

/// A connection that fetches.
pub(super) fn fetching(
    plan: &FetchPlan,
    grant: &Grant,
    options: &Options,
    class: Class,
) -> Result<Fetching, String> {
    let connected = connect(plan, grant, options, Fetch::Open(class))?;
    match connected.answer {
        Fetch::Opened(salt) => {
            let (link_key, data_key) = (&grant.hop.link_key, grant.data_key.as_ref());
            let guard = Guard::new(&plan.plan, link_key, data_key, &salt);
            let Connected {
                socket,
                receiver,
                transmitter,
                ..
            } = connected;
            Ok((socket, receiver, transmitter, guard))
        }
        _ => Err("the source answered out of order".to_owned()),
    }
}
