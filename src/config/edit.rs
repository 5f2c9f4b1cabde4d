//! Changing the peers of a volume in the text of a configuration file. Comments, order and layout
//! of everything else stay as they are.
//!
//! Pure: text in, text out. What comes out still has to be checked by [`super::Config::parse`].

use thiserror::Error;
use toml_edit::{Array, ArrayOfTables, DocumentMut, Item, Table, TableLike, Value, value};

/// The keys of a `[[volume.peer]]` that are to be set; the others stay.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PeerEdit {
    /// `name`
    pub name: Option<String>,
    /// `key_pin`
    pub key_pin: Option<String>,
    /// `address`
    pub address: Option<String>,
    /// `transport`
    pub transport: Option<String>,
    /// `roles`
    pub roles: Option<Vec<String>>,
    /// `max_lag_bytes`
    pub max_lag_bytes: Option<u64>,
    /// `max_lag_seconds`
    pub max_lag_seconds: Option<u64>,
    /// `on_exceed`
    pub on_exceed: Option<String>,
}

/// Why the text was not changed.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum EditError {
    /// It is not TOML.
    #[error("it cannot be read as TOML: {0}")]
    NotToml(String),
    /// There is no such volume.
    #[error("it has no [[volume]] named {0:?}")]
    NoVolume(String),
    /// There is no such peer.
    #[error("volume {volume:?} has no [[volume.peer]] named {peer:?}")]
    NoPeer {
        /// The volume.
        volume: String,
        /// The peer.
        peer: String,
    },
    /// The peer is there already.
    #[error("volume {volume:?} has a peer named {peer:?} already; use `hn4ctl peer replace`")]
    Twice {
        /// The volume.
        volume: String,
        /// The peer.
        peer: String,
    },
    /// It is written in a way that is not changed here.
    #[error(
        "{0} is not written as sections [[{0}]]; change the file by hand, then `hn4ctl reload`"
    )]
    NotSections(&'static str),
}

/// Adds a peer behind those of the volume.
///
/// # Errors
/// [`EditError`]; the text is not changed then.
pub fn add(text: &str, volume: &str, peer: &PeerEdit) -> Result<String, EditError> {
    let mut document = parse(text)?;
    let table = volume_table(&mut document, volume)?;
    let name = peer.name.clone().unwrap_or_default();
    let peers = table
        .entry("peer")
        .or_insert(Item::ArrayOfTables(ArrayOfTables::new()));
    let peers = peers.as_array_of_tables_mut();
    let peers = peers.ok_or(EditError::NotSections("volume.peer"))?;
    if position(peers, &name).is_some() {
        let volume = volume.to_owned();
        return Err(EditError::Twice { volume, peer: name });
    }
    let mut added = Table::new();
    added.decor_mut().set_prefix("\n");
    apply(&mut added, peer);
    peers.push(added);
    Ok(document.to_string())
}

/// Removes a peer with everything in its section.
///
/// # Errors
/// [`EditError`]; the text is not changed then.
pub fn remove(text: &str, volume: &str, peer: &str) -> Result<String, EditError> {
    let mut document = parse(text)?;
    let table = volume_table(&mut document, volume)?;
    let peers = peers_of(table, volume, peer)?;
    let index = position(peers, peer).ok_or_else(|| no_peer(volume, peer))?;
    peers.remove(index);
    if peers.is_empty() {
        table.remove("peer");
    }
    Ok(document.to_string())
}

/// Sets keys of a peer. Another key without an address means another node: the address that was
/// there goes.
///
/// # Errors
/// [`EditError`]; the text is not changed then.
pub fn replace(text: &str, volume: &str, peer: &str, edit: &PeerEdit) -> Result<String, EditError> {
    let mut document = parse(text)?;
    let table = volume_table(&mut document, volume)?;
    let peers = peers_of(table, volume, peer)?;
    if let Some(name) = edit.name.as_ref().filter(|name| *name != peer)
        && position(peers, name).is_some()
    {
        let (volume, peer) = (volume.to_owned(), name.clone());
        return Err(EditError::Twice { volume, peer });
    }
    let index = position(peers, peer).ok_or_else(|| no_peer(volume, peer))?;
    let found = peers.get_mut(index).ok_or_else(|| no_peer(volume, peer))?;
    if edit.name.as_ref().is_some_and(|name| name != peer) {
        found.remove("address");
    }
    apply(found, edit);
    Ok(document.to_string())
}

fn parse(text: &str) -> Result<DocumentMut, EditError> {
    text.parse()
        .map_err(|error: toml_edit::TomlError| EditError::NotToml(error.to_string()))
}

fn volume_table<'d>(document: &'d mut DocumentMut, name: &str) -> Result<&'d mut Table, EditError> {
    let missing = || EditError::NoVolume(name.to_owned());
    let volumes = document.get_mut("volume").ok_or_else(missing)?;
    let volumes = volumes.as_array_of_tables_mut();
    let volumes = volumes.ok_or(EditError::NotSections("volume"))?;
    let mut volumes = volumes.iter_mut();
    volumes
        .find(|table| is_named(*table, name))
        .ok_or_else(missing)
}

fn peers_of<'t>(
    table: &'t mut Table,
    volume: &str,
    peer: &str,
) -> Result<&'t mut ArrayOfTables, EditError> {
    let peers = table.get_mut("peer").ok_or_else(|| no_peer(volume, peer))?;
    peers
        .as_array_of_tables_mut()
        .ok_or(EditError::NotSections("volume.peer"))
}

fn position(peers: &ArrayOfTables, name: &str) -> Option<usize> {
    peers.iter().position(|table| is_named(table, name))
}

fn is_named(table: &dyn TableLike, name: &str) -> bool {
    table.get("name").and_then(Item::as_str) == Some(name)
}

fn no_peer(volume: &str, peer: &str) -> EditError {
    EditError::NoPeer {
        volume: volume.to_owned(),
        peer: peer.to_owned(),
    }
}

fn apply(table: &mut Table, edit: &PeerEdit) {
    let texts = [
        ("name", &edit.name),
        ("address", &edit.address),
        ("key_pin", &edit.key_pin),
        ("transport", &edit.transport),
        ("on_exceed", &edit.on_exceed),
    ];
    for (key, text) in texts {
        if let Some(text) = text {
            set(table, key, text.as_str().into());
        }
    }
    if let Some(roles) = &edit.roles {
        set(
            table,
            "roles",
            Value::Array(roles.iter().collect::<Array>()),
        );
    }
    let numbers = [
        ("max_lag_bytes", edit.max_lag_bytes),
        ("max_lag_seconds", edit.max_lag_seconds),
    ];
    for (key, number) in numbers {
        if let Some(number) = number {
            // What is too large is refused by the check of the file.
            set(table, key, i64::try_from(number).unwrap_or(i64::MAX).into());
        }
    }
}

/// Sets a key; a comment behind its old value stays.
fn set(table: &mut Table, key: &str, mut new: Value) {
    if let Some(old) = table.get(key).and_then(Item::as_value) {
        *new.decor_mut() = old.decor().clone();
    }
    table.insert(key, value(new));
}
