//! The key management service: an engine that knows neither gRPC nor sockets, the adapters around it, and the daemon.
//!
//! `rpc` and `server` are adapters; `engine` holds the rules; `store`, `ratchet`, `slot`, `blob` and `audit` are what it stands
//! on.
//! docs/kms-format.md gives every byte that is written.

pub mod audit;
mod blob;
mod clock;
mod engine;
mod epoch;
mod fence;
mod harden;
mod home;
mod metrics;
mod observed;
mod ratchet;
mod rows;
mod rpc;
mod server;
mod slot;
mod store;

pub use clock::{Clock, SystemClock};
pub use engine::{Call, Engine, NewKey, NewKeystore, OpenError, Placement, Principal, Trail};
pub use harden::harden;
pub use home::{HomeError, audit_log};
pub use rows::KeyRow;
pub use server::{ServeError, ServeOptions, serve};
pub use slot::{
    Erasure, FileRootSlot, Keeper, Passphrase, PassphraseRootSlot, RootSlot, SlotError, SlotKind,
};
pub use store::StoreError;
