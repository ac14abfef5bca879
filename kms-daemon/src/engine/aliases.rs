//! Aliases: names of keys, which can be moved.

use super::call::{Call, Trail};
use super::{Effect, Engine};
use crate::rows::AliasRow;
use crate::store::{Change, Table};
use kms_api::{Code, KmsError};
use prost::Message;
use uuid::Uuid;

/// Aliases in one keystore, at most.
const ALIASES_MAX: usize = 50_000;
const NAME_MAX: usize = 255;
const PREFIX: &str = "alias/";

impl Engine {
    /// Names a key.
    ///
    /// # Errors
    /// `Rejected.AliasExists`, `Forbidden.KeyNotFound`, `InvalidParameter`.
    pub fn create_alias(
        &self,
        call: &Call,
        trail: &mut Trail,
        alias: &str,
        key: &str,
    ) -> Result<(), KmsError> {
        check_name(alias)?;
        let mut aliases = self.aliases.write();
        let id = self.resolve_id(key)?;
        trail.note(self.arn(id));
        self.must_live(id)?;
        if aliases.contains_key(alias) {
            return Err(KmsError::new(
                Code::AliasExists,
                format!("{alias} names a key already"),
            ));
        }
        if aliases.len() >= ALIASES_MAX {
            let message = format!("this keystore holds {ALIASES_MAX} aliases, which is its limit");
            return Err(KmsError::new(Code::LimitExceeded, message));
        }
        let row = AliasRow {
            revision: 1,
            name: alias.to_owned(),
            key_id: id.as_bytes().to_vec(),
        };
        self.write_alias(call, trail, &row)?;
        aliases.insert(alias.to_owned(), row);
        Ok(())
    }

    /// Lets an alias name another key.
    ///
    /// # Errors
    /// `Forbidden.AliasNotFound`, `Forbidden.KeyNotFound`, `InvalidParameter`.
    pub fn update_alias(
        &self,
        call: &Call,
        trail: &mut Trail,
        alias: &str,
        key: &str,
    ) -> Result<(), KmsError> {
        check_name(alias)?;
        let mut aliases = self.aliases.write();
        let id = self.resolve_id(key)?;
        trail.note(self.arn(id));
        self.must_live(id)?;
        let row = aliases.get_mut(alias).ok_or_else(|| not_found(alias))?;
        let next = AliasRow {
            revision: row.revision + 1,
            name: alias.to_owned(),
            key_id: id.as_bytes().to_vec(),
        };
        self.write_alias(call, trail, &next)?;
        *row = next;
        Ok(())
    }

    /// Removes an alias; the key stays.
    ///
    /// # Errors
    /// `Forbidden.AliasNotFound`, `InvalidParameter`.
    pub fn delete_alias(&self, call: &Call, trail: &mut Trail, alias: &str) -> Result<(), KmsError> {
        check_name(alias)?;
        let mut aliases = self.aliases.write();
        let row = aliases.get(alias).ok_or_else(|| not_found(alias))?;
        if let Ok(id) = Uuid::from_slice(&row.key_id) {
            trail.note(self.arn(id));
        }
        // Its name is hidden under keys of the epoch that it is written in.
        let build = |change: &mut Change<'_>| {
            let name = change.hidden_name(alias);
            change.delete(Table::Aliases, &name)
        };
        self.commit(call, trail, Effect::Other, build, |_| {})?;
        aliases.remove(alias);
        Ok(())
    }

    /// Every alias and its key, ordered by name; of one key alone if it is given.
    ///
    /// # Errors
    /// `Forbidden.KeyNotFound`
    pub fn list_aliases(
        &self,
        trail: &mut Trail,
        key: Option<&str>,
    ) -> Result<Vec<(String, Uuid)>, KmsError> {
        let only = key.map(|key| self.resolve(key)).transpose()?;
        if let Some(id) = only {
            trail.note(self.arn(id));
        }
        let aliases = self.aliases.read();
        let all = aliases
            .values()
            .filter_map(|row| Some((row.name.clone(), Uuid::from_slice(&row.key_id).ok()?)));
        Ok(all
            .filter(|(_, id)| only.is_none_or(|only| only == *id))
            .collect())
    }

    /// The key that an alias names.
    pub(super) fn alias_target(&self, alias: &str) -> Option<Uuid> {
        let aliases = self.aliases.read();
        Uuid::from_slice(&aliases.get(alias)?.key_id).ok()
    }

    fn write_alias(&self, call: &Call, trail: &mut Trail, row: &AliasRow) -> Result<(), KmsError> {
        let build = |change: &mut Change<'_>| {
            let name = change.hidden_name(&row.name);
            change.put(Table::Aliases, &name, &row.encode_to_vec())
        };
        self.commit(call, trail, Effect::Other, build, |_| {})
    }
}

fn check_name(alias: &str) -> Result<(), KmsError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '_' | '-');
    match alias.strip_prefix(PREFIX) {
        Some(name) if !name.is_empty() && alias.len() <= NAME_MAX && name.chars().all(allowed) => Ok(()),
        _ => Err(KmsError::invalid(
            "AliasName",
            "must be 'alias/' and 1 to 249 of letters, digits, '/', '_' and '-'",
        )),
    }
}

fn not_found(alias: &str) -> KmsError {
    KmsError::new(Code::AliasNotFound, format!("no alias '{alias}' here"))
}
