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
    match table.get_mut(key) {
        // The key itself stays, with what stands before it.
        Some(item) => {
            if let Some(old) = item.as_value() {
                *new.decor_mut() = old.decor().clone();
            }
            *item = value(new);
        }
        None => {
            table.insert(key, value(new));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
# The node.
[node]
name = \"alpha\"   # as in its certificate

[[volume]]
name = \"one\"
ack = \"durable\" # k = 1

[[volume.peer]]
# In the other building.
name = \"beta\"
address = \"beta:1\" # the fast line
key_pin = \"x\"

[[volume]]
name = \"two\"

# The end.
";

    fn peer(name: &str) -> PeerEdit {
        PeerEdit {
            name: Some(name.to_owned()),
            key_pin: Some("y".to_owned()),
            roles: Some(vec!["replica".to_owned()]),
            max_lag_bytes: Some(7),
            ..PeerEdit::default()
        }
    }

    #[test]
    fn a_peer_comes_behind_the_others_of_its_own_volume_and_goes_without_a_trace() {
        let section = "\n[[volume.peer]]\nname = \"gamma\"\nkey_pin = \"y\"\n\
                       roles = [\"replica\"]\nmax_lag_bytes = 7\n";
        let one = add(TEXT, "one", &peer("gamma")).expect("added");
        let place = "key_pin = \"x\"\n";
        assert_eq!(one, TEXT.replace(place, &format!("{place}{section}")));
        assert_eq!(remove(&one, "one", "gamma").as_deref(), Ok(TEXT));
        let two = add(TEXT, "two", &peer("gamma")).expect("added");
        let place = "name = \"two\"\n";
        assert_eq!(two, TEXT.replace(place, &format!("{place}{section}")));
        assert_eq!(remove(&two, "two", "gamma").as_deref(), Ok(TEXT));
    }

    #[test]
    fn a_replacement_keeps_comments_and_another_node_does_not_keep_the_address() {
        let moved = PeerEdit {
            address: Some("beta:2".to_owned()),
            ..PeerEdit::default()
        };
        let text = replace(TEXT, "one", "beta", &moved).expect("replaced");
        assert_eq!(text, TEXT.replace("beta:1", "beta:2"));
        let text = replace(TEXT, "one", "beta", &peer("gamma")).expect("replaced");
        assert!(
            !text.contains("beta:1") && text.contains("# In the other building.\nname = \"gamma\"")
        );
    }

    #[test]
    fn what_is_not_there_or_is_there_already_is_told() {
        let no_volume = Err(EditError::NoVolume("three".to_owned()));
        assert_eq!(remove(TEXT, "three", "beta"), no_volume);
        assert_eq!(remove(TEXT, "one", "gamma"), Err(no_peer("one", "gamma")));
        assert_eq!(remove(TEXT, "two", "beta"), Err(no_peer("two", "beta")));
        let twice = add(TEXT, "one", &peer("beta"));
        assert!(matches!(twice, Err(EditError::Twice { .. })));
        let inline = "volume = [{ name = \"one\" }]\n";
        let refused = add(inline, "one", &peer("beta"));
        assert_eq!(refused, Err(EditError::NotSections("volume")));
        assert!(matches!(
            add("[", "one", &peer("beta")),
            Err(EditError::NotToml(_))
        ));
    }
}
