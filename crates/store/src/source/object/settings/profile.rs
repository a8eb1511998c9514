//! The files that Amazon's clients keep credentials and regions in.
//!
//! Only what stands in the files themselves is read: keys, session token, region and endpoint. A profile that leads
//! elsewhere (single sign-on, a role, a process) is told from one that has no keys, so that the error says what to do.
//! **Source:** "Configuration and credential file settings", AWS SDKs and tools reference guide.

use std::{collections::HashMap, fs, io::ErrorKind, path::PathBuf};

use object_store::aws::AmazonS3ConfigKey;

use crate::options::Settings;

/// What a profile says.
#[derive(Default)]
pub(super) struct Profile {
    pub(super) credentials: Vec<(AmazonS3ConfigKey, String)>,
    pub(super) places: Vec<(AmazonS3ConfigKey, String)>,
    /// Why its credentials cannot be used, where it has some of a kind that is not read.
    pub(super) unusable: Option<String>,
}

/// Reads the profile that is named, or the default one where there is one.
pub(super) fn read(settings: &Settings) -> Result<Profile, String> {
    let named = settings.get("AWS_PROFILE");
    let name = named.unwrap_or("default");
    let home = settings.get("HOME").map(PathBuf::from);
    let file = |variable: &str, usual: &str| {
        let path = settings.get(variable).map(PathBuf::from);
        path.or_else(|| Some(home.as_ref()?.join(".aws").join(usual)))
    };
    let mut found = HashMap::new();
    let mut seen = false;
    let places = [
        (file("AWS_CONFIG_FILE", "config"), format!("profile {name}")),
        (file("AWS_SHARED_CREDENTIALS_FILE", "credentials"), name.to_owned()),
    ];
    for (path, section) in places {
        let Some(path) = path else { continue };
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(format!("{}: {error}", path.display())),
        };
        // in the configuration file the default profile goes without the word "profile"
        for wanted in [section.as_str(), name] {
            if let Some(values) = section_of(&text, wanted) {
                seen = true;
                found.extend(values);
                break;
            }
        }
    }
    match named {
        Some(name) if !seen => Err(format!("AWS_PROFILE={name}: there is no such profile")),
        _ => Ok(profile(name, found)),
    }
}

fn profile(name: &str, mut values: HashMap<String, String>) -> Profile {
    let mut take = |pairs: &[(&str, AmazonS3ConfigKey)]| -> Vec<(AmazonS3ConfigKey, String)> {
        pairs.iter().filter_map(|(name, key)| Some((*key, values.remove(*name)?))).collect()
    };
    let credentials = take(&[
        ("aws_access_key_id", AmazonS3ConfigKey::AccessKeyId),
        ("aws_secret_access_key", AmazonS3ConfigKey::SecretAccessKey),
        ("aws_session_token", AmazonS3ConfigKey::Token),
    ]);
    let places = take(&[
        ("region", AmazonS3ConfigKey::Region),
        ("endpoint_url", AmazonS3ConfigKey::Endpoint),
    ]);
    let elsewhere =
        ["sso_session", "sso_start_url", "role_arn", "credential_process", "login_session"];
    let elsewhere =
        elsewhere.iter().find(|key| values.contains_key(**key)).filter(|_| credentials.is_empty());
    let unusable = elsewhere.map(|key| {
        format!(
            "the AWS profile {name} has no keys but {key}, which is not read; \
             `aws configure export-credentials --profile {name} --format env` prints variables to set"
        )
    });
    Profile { credentials, places, unusable }
}

/// The `name = value` lines of one `[section]`. Indented lines belong to nested settings and are left out.
fn section_of(text: &str, wanted: &str) -> Option<HashMap<String, String>> {
    let mut values = None;
    let mut inside = false;
    for line in text.lines() {
        if line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(header) = line.trim().strip_prefix('[').and_then(|rest| rest.split(']').next())
        {
            inside = header.split_whitespace().eq(wanted.split_whitespace());
            if inside {
                values.get_or_insert_with(HashMap::new);
            }
        } else if let (true, false, Some((name, value))) =
            (inside, line.starts_with([' ', '\t']), line.split_once('='))
        {
            let value = value.split(" #").next().unwrap_or_default().trim();
            if let Some(values) = values.as_mut().filter(|_| !value.is_empty()) {
                values.insert(name.trim().to_ascii_lowercase(), value.to_owned());
            }
        }
    }
    values
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(
        config: &str,
        credentials: &str,
        profile: Option<&str>,
    ) -> (tempfile::TempDir, Settings) {
        let home = tempfile::tempdir().unwrap();
        let aws = home.path().join(".aws");
        fs::create_dir(&aws).unwrap();
        fs::write(aws.join("config"), config).unwrap();
        fs::write(aws.join("credentials"), credentials).unwrap();
        let mut pairs = vec![("HOME".to_owned(), home.path().to_str().unwrap().to_owned())];
        pairs.extend(profile.map(|name| ("AWS_PROFILE".to_owned(), name.to_owned())));
        (home, pairs.into_iter().collect())
    }

    #[test]
    fn a_profile_is_joined_from_both_files() {
        let config =
            "[default]\nregion=x\n[profile p]\nregion = eu-west-1 # home\ns3 =\n  max = 1\n";
        let credentials = "[default]\naws_access_key_id=a\n\n[p]\naws_access_key_id = k\naws_secret_access_key = s=/+\n";
        let (_home, settings) = settings(config, credentials, Some("p"));
        let profile = read(&settings).unwrap();
        let key = |name: &str| name.to_owned();
        assert_eq!(
            profile.credentials,
            [
                (AmazonS3ConfigKey::AccessKeyId, key("k")),
                (AmazonS3ConfigKey::SecretAccessKey, key("s=/+"))
            ]
        );
        assert_eq!(profile.places, [(AmazonS3ConfigKey::Region, key("eu-west-1"))]);
    }

    #[test]
    fn the_default_profile_need_not_be_there() {
        let profile = read(&Settings::default()).unwrap();
        assert!(profile.credentials.is_empty() && profile.unusable.is_none());
        let (_home, settings) = settings("", "", Some("absent"));
        assert!(read(&settings).err().unwrap().contains("absent"));
    }

    #[test]
    fn a_profile_that_leads_elsewhere_is_named() {
        let (_home, settings) = settings("[profile p]\nsso_session = x\n", "", Some("p"));
        assert!(read(&settings).unwrap().unusable.unwrap().contains("sso_session"));
    }
}
