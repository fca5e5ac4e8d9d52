//! Keeps a transport's state, and writes no more of it than has changed.
//!
//! Most messages change nothing but how far the connection has got, so that is kept in a record of its own as well. Both
//! records are numbered, and the later one tells where the connection is.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::link::LinkV1;
use crate::engine::DeviceId;
use crate::keeper::{Keeper, encode};

#[derive(Serialize, Deserialize)]
struct StateV1<S, L> {
    number: u64,
    link: L,
    state: S,
}

#[derive(Serialize, Deserialize)]
struct PlaceV1<L> {
    number: u64,
    link: L,
}

/// What is kept of one device's transport.
#[derive(Debug)]
pub(crate) struct Saver {
    keeper: Keeper,
    id: DeviceId,
    number: u64,
    state: Vec<u8>,
    link: Option<LinkV1>,
}

impl Saver {
    pub(crate) fn new(id: DeviceId, keeper: &Keeper) -> Saver {
        Saver {
            keeper: keeper.clone(),
            id,
            number: 0,
            state: Vec::new(),
            link: None,
        }
    }

    pub(crate) fn keeper(&self) -> &Keeper {
        &self.keeper
    }

    /// The name of the memory that the connection's ledger lies in.
    pub(crate) fn ledger(&self) -> String {
        format!("ledger/{}", self.id.0)
    }

    fn state_key(&self) -> String {
        format!("transport/{}", self.id.0)
    }

    fn link_key(&self) -> String {
        format!("link/{}", self.id.0)
    }

    /// Keeps both, as far as they have changed.
    pub(crate) fn save(&mut self, state: &impl Serialize, link: Option<LinkV1>) {
        if !self.keeper.is_on() {
            return;
        }
        let bytes = encode(state);
        if bytes != self.state {
            self.number = self.number.wrapping_add(1);
            let number = self.number;
            let link = &link;
            self.keeper.save(
                &self.state_key(),
                &StateV1 {
                    number,
                    link,
                    state,
                },
            );
            self.state = bytes;
        } else if link != self.link {
            self.number = self.number.wrapping_add(1);
            let number = self.number;
            let link = &link;
            self.keeper
                .save(&self.link_key(), &PlaceV1 { number, link });
        }
        self.link = link;
        self.keeper.fds().sweep();
    }

    /// What a former process has kept.
    pub(crate) fn load<S: DeserializeOwned + Serialize>(&mut self) -> Option<(S, Option<LinkV1>)> {
        let StateV1 {
            number,
            link,
            state,
        } = self
            .keeper
            .load::<StateV1<S, Option<LinkV1>>>(&self.state_key())?;
        let place: Option<PlaceV1<Option<LinkV1>>> = self.keeper.load(&self.link_key());
        let (number, link) = match place.filter(|place| place.number > number) {
            Some(place) => (place.number, place.link),
            None => (number, link),
        };
        self.number = number;
        self.state = encode(&state);
        self.link.clone_from(&link);
        Some((state, link))
    }

    /// Forgets everything; the device is gone.
    pub(crate) fn forget(&self) {
        self.keeper.forget(&self.state_key());
        self.keeper.forget(&self.link_key());
        self.keeper.forget_words(&self.ledger());
        self.keeper.fds().sweep();
    }
}
