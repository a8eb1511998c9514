//! From settings to a client of S3, GCS or Azure. What the clients read from the environment themselves is read from
//! [`Settings`] here, by the same names, and a value that makes no sense is an error that names it.

mod profile;

use std::{net::IpAddr, sync::Arc};

use object_store::{
    ClientOptions, HeaderMap, HeaderValue, ObjectStore,
    aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey},
    azure::{AzureConfigKey, MicrosoftAzureBuilder},
    gcp::{GoogleCloudStorageBuilder, GoogleConfigKey},
};

use crate::{
    counters::Cells,
    error::StoreError,
    failure::redact,
    location::{Location, Service},
    options::{Settings, StoreOptions},
    transport::{WatchedConnector, chain},
};

use super::no_retries;

/// The client for objects, and the one for metadata.
type Clients = (Arc<dyn ObjectStore>, Arc<dyn ObjectStore>);

/// Makes the clients for a location. Nothing is asked of the network.
pub(super) fn connect(
    location: &Location,
    options: &StoreOptions,
    counters: Arc<Cells>,
) -> Result<Clients, StoreError> {
    let connection = Connection { location, options, counters };
    match location.service() {
        Service::S3 => connection.s3(),
        Service::Gcs => connection.gcs(),
        Service::Azure => connection.azure(),
        Service::Hub => Err(connection.bad("not an object store")),
    }
}

struct Connection<'a> {
    location: &'a Location,
    options: &'a StoreOptions,
    counters: Arc<Cells>,
}

impl Connection<'_> {
    fn s3(&self) -> Result<Clients, StoreError> {
        let settings = self.settings();
        let mut keys: Vec<(AmazonS3ConfigKey, String)> = Vec::new();
        for (name, value) in settings.starting_with("AWS_") {
            if let Ok(key) = name.to_ascii_lowercase().parse() {
                keys.push((key, value.to_owned()));
            }
        }
        let has = |keys: &[(AmazonS3ConfigKey, String)], wanted: AmazonS3ConfigKey| {
            keys.iter().any(|(key, _)| *key == wanted)
        };
        let others = [
            AmazonS3ConfigKey::AccessKeyId,
            AmazonS3ConfigKey::WebIdentityTokenFile,
            AmazonS3ConfigKey::ContainerCredentialsRelativeUri,
            AmazonS3ConfigKey::ContainerCredentialsFullUri,
            AmazonS3ConfigKey::SkipSignature,
        ];
        let profile = profile::read(settings).map_err(|reason| self.bad(reason))?;
        // as in Amazon's own clients: variables first, then the profile; a profile that is named beats roles of the machine
        if !others.iter().any(|key| has(&keys, *key)) {
            if let Some(reason) = &profile.unusable {
                return Err(self.bad(reason));
            }
            keys.extend(profile.credentials);
        }
        for (key, value) in profile.places {
            let named = match key {
                AmazonS3ConfigKey::Region => {
                    has(&keys, key) || has(&keys, AmazonS3ConfigKey::DefaultRegion)
                }
                _ => {
                    has(&keys, AmazonS3ConfigKey::Endpoint)
                        || has(&keys, AmazonS3ConfigKey::S3Endpoint)
                }
            };
            if !named {
                keys.push((key, value));
            }
        }
        let endpoint = settings.first(&["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"]);
        let endpoint = endpoint.map(|(name, value)| (name, value.to_owned()));
        let allow_http =
            self.allow_http(endpoint.as_ref().map(|(n, v)| (*n, v.as_str())), "AWS_ALLOW_HTTP")?;
        let virtual_hosted = has_true(&keys, AmazonS3ConfigKey::VirtualHostedStyleRequest);
        let bucket = self.location.container();
        let build = |headers: Option<HeaderMap>, credentials: Option<&AmazonS3>| {
            let mut builder = AmazonS3Builder::new()
                .with_client_options(self.client_options(headers))
                .with_retry(no_retries())
                .with_http_connector(self.connector());
            for (key, value) in &keys {
                builder = builder.with_config(*key, value);
            }
            if allow_http {
                builder = builder.with_allow_http(true);
            }
            if let (Some((_, url)), true) = (&endpoint, virtual_hosted) {
                builder = builder.with_endpoint(with_bucket(url, bucket));
            }
            if let Some(first) = credentials {
                builder = builder.with_credentials(Arc::clone(first.credentials()));
            }
            builder.with_bucket_name(bucket).build().map_err(|error| self.bad(chain(&error)))
        };
        let store = build(None, None)?;
        // HEAD and GET tell checksums only to who asks for them. **Source:** "GetObject", Amazon S3 API reference.
        let asking = HeaderMap::from_iter([(
            "x-amz-checksum-mode".parse().map_err(|_| self.bad("header"))?,
            HeaderValue::from_static("ENABLED"),
        )]);
        let informed = build(Some(asking), Some(&store))?;
        Ok((Arc::new(store), Arc::new(informed)))
    }

    fn gcs(&self) -> Result<Clients, StoreError> {
        let settings = self.settings();
        let mut builder = GoogleCloudStorageBuilder::new()
            .with_client_options(self.client_options(None))
            .with_retry(no_retries())
            .with_http_connector(self.connector());
        if let Some((_, path)) = settings.first(&["SERVICE_ACCOUNT"]) {
            builder = builder.with_service_account_path(path);
        }
        for (name, value) in settings.starting_with("GOOGLE_") {
            if let Ok(key) = name.to_ascii_lowercase().parse::<GoogleConfigKey>() {
                builder = builder.with_config(key, value);
            }
        }
        // what Google's own clients call it
        let mut endpoint =
            settings.first(&["GOOGLE_BASE_URL"]).map(|(name, url)| (name, url.to_owned()));
        if let (None, Some(url)) = (&endpoint, settings.get("STORAGE_EMULATOR_HOST")) {
            let url = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
            builder = builder.with_base_url(url.trim_end_matches('/')).with_skip_signature(true);
            endpoint = Some(("STORAGE_EMULATOR_HOST", url));
        }
        let allow_http =
            self.allow_http(endpoint.as_ref().map(|(n, v)| (*n, v.as_str())), "GOOGLE_ALLOW_HTTP")?;
        if allow_http {
            builder = builder.with_config(
                GoogleConfigKey::Client(object_store::ClientConfigKey::AllowHttp),
                "true",
            );
        }
        let store = builder.with_bucket_name(self.location.container()).build();
        let store: Arc<dyn ObjectStore> = Arc::new(store.map_err(|error| self.bad(chain(&error)))?);
        Ok((Arc::clone(&store), store))
    }

    fn azure(&self) -> Result<Clients, StoreError> {
        let settings = self.settings();
        let mut builder = MicrosoftAzureBuilder::new()
            .with_client_options(self.client_options(None))
            .with_retry(no_retries())
            .with_http_connector(self.connector());
        // what Azure's own command line calls them
        let aliases = [
            ("AZURE_STORAGE_ACCOUNT", AzureConfigKey::AccountName),
            ("AZURE_STORAGE_KEY", AzureConfigKey::AccessKey),
            ("AZURE_STORAGE_SERVICE_ENDPOINT", AzureConfigKey::Endpoint),
        ];
        for (name, key) in aliases {
            if let Some(value) = settings.get(name) {
                builder = builder.with_config(key, value);
            }
        }
        let mut endpoint = settings.first(&[
            "AZURE_STORAGE_ENDPOINT",
            "AZURE_ENDPOINT",
            "AZURE_STORAGE_SERVICE_ENDPOINT",
        ]);
        if let Some(text) = settings.get("AZURE_STORAGE_CONNECTION_STRING") {
            for (name, value) in connection_string(text).ok_or_else(|| {
                self.bad("AZURE_STORAGE_CONNECTION_STRING is not of the form Name=value;Name=value")
            })? {
                let key = match name {
                    "AccountName" => AzureConfigKey::AccountName,
                    "AccountKey" => AzureConfigKey::AccessKey,
                    "SharedAccessSignature" => AzureConfigKey::SasKey,
                    "BlobEndpoint" => {
                        endpoint = Some(("AZURE_STORAGE_CONNECTION_STRING", value));
                        AzureConfigKey::Endpoint
                    }
                    _ => continue,
                };
                builder = builder.with_config(key, value);
            }
        }
        for (name, value) in settings.starting_with("AZURE_") {
            if let Ok(key) = name.to_ascii_lowercase().parse::<AzureConfigKey>() {
                builder = builder.with_config(key, value);
            }
        }
        let account = settings.first(&[
            "AZURE_STORAGE_ACCOUNT_NAME",
            "AZURE_STORAGE_ACCOUNT",
            "AZURE_STORAGE_CONNECTION_STRING",
        ]);
        let emulator = settings.get("AZURE_STORAGE_USE_EMULATOR");
        if account.or(emulator.map(|value| ("", value))).is_none() {
            return Err(self.bad("the account is not known: set AZURE_STORAGE_ACCOUNT_NAME"));
        }
        if self.allow_http(endpoint, "AZURE_ALLOW_HTTP")? {
            builder = builder.with_allow_http(true);
        }
        let store = builder.with_container_name(self.location.container()).build();
        let store: Arc<dyn ObjectStore> = Arc::new(store.map_err(|error| self.bad(chain(&error)))?);
        Ok((Arc::clone(&store), store))
    }

    fn settings(&self) -> &Settings {
        &self.options.settings
    }

    fn connector(&self) -> WatchedConnector {
        WatchedConnector::new(Arc::clone(&self.counters))
    }

    /// No limit on a whole body; one on silence, as long as the reader's, for the requests that the reader does not watch
    /// (lists, credentials).
    fn client_options(&self, headers: Option<HeaderMap>) -> ClientOptions {
        let options = ClientOptions::new()
            .with_timeout_disabled()
            .with_read_timeout(self.options.stall_after.mul_f64(1.25))
            .with_http1_only()
            .with_user_agent(HeaderValue::from_static(concat!(
                "longshore/",
                env!("CARGO_PKG_VERSION")
            )));
        match headers {
            Some(headers) => options.with_default_headers(headers),
            None => options,
        }
    }

    /// Whether plain HTTP is meant: always to this machine itself; to others it has to be said.
    fn allow_http(&self, endpoint: Option<(&str, &str)>, switch: &str) -> Result<bool, StoreError> {
        let Some((name, url)) = endpoint else { return Ok(false) };
        let shown = redact(url);
        let Some((scheme, rest)) = url.split_once("://") else {
            return Err(
                self.bad(format!("{name}={shown} is not a URL: https:// or http:// is missing"))
            );
        };
        match scheme.to_ascii_lowercase().as_str() {
            "https" => Ok(false),
            "http" if is_loopback(rest) => Ok(true),
            "http" if self.settings().get(switch).is_some() => Ok(false),
            "http" => Err(self.bad(format!(
                "{name}={shown} is not encrypted; if that is meant, set {switch}=true"
            ))),
            _ => Err(self.bad(format!("{name}={shown} is neither http nor https"))),
        }
    }

    fn bad(&self, reason: impl AsRef<str>) -> StoreError {
        StoreError::BadSetting {
            location: self.location.to_string(),
            reason: redact(reason.as_ref()),
        }
    }
}

fn has_true(keys: &[(AmazonS3ConfigKey, String)], wanted: AmazonS3ConfigKey) -> bool {
    keys.iter().any(|(key, value)| {
        *key == wanted
            && matches!(value.to_ascii_lowercase().as_str(), "1" | "true" | "on" | "yes" | "y")
    })
}

/// Where requests are virtual-hosted, `object_store` wants the bucket in the endpoint; others want it left out.
fn with_bucket(url: &str, bucket: &str) -> String {
    match url.split_once("://") {
        Some((scheme, host)) if !host.starts_with(&format!("{bucket}.")) => {
            format!("{scheme}://{bucket}.{host}")
        }
        _ => url.to_owned(),
    }
}

/// Whether the host of `host:port/path` is this machine.
pub(crate) fn is_loopback(rest: &str) -> bool {
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let authority = authority.rsplit('@').next().unwrap_or_default();
    let host = match authority.strip_prefix('[') {
        Some(six) => six.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    host.eq_ignore_ascii_case("localhost")
        || host.to_ascii_lowercase().ends_with(".localhost")
        || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// `Name=value;Name=value`. **Source:** "Configure Azure Storage connection strings", Azure Storage.
fn connection_string(text: &str) -> Option<Vec<(&str, &str)>> {
    text.split(';')
        .filter(|part| !part.trim().is_empty())
        .map(|part| part.trim().split_once('='))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_told_from_others() {
        for host in ["127.0.0.1:9000", "localhost/x", "[::1]:80", "LOCALHOST:1", "b.localhost:1"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["10.0.0.1", "localhost.example.com", "example.com@x", "[::2]:1", ""] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn the_bucket_is_put_before_the_host_once() {
        assert_eq!(with_bucket("https://s3.x:1", "b"), "https://b.s3.x:1");
        assert_eq!(with_bucket("https://b.s3.x:1", "b"), "https://b.s3.x:1");
    }

    fn open(text: &str, settings: Settings) -> Result<Clients, StoreError> {
        let location = Location::parse(text).unwrap().unwrap();
        let options = StoreOptions { settings, ..StoreOptions::default() };
        connect(&location, &options, Arc::default())
    }

    #[test]
    fn senseless_values_are_refused_by_name() {
        let cases: [(&str, Settings, &str); 5] = [
            (
                "s3://b/x",
                [("AWS_ALLOW_HTTP", "perhaps"), ("AWS_SKIP_SIGNATURE", "1")].into(),
                "perhaps",
            ),
            ("s3://b/x", [("AWS_ENDPOINT_URL", "http://10.0.0.1:9000")].into(), "AWS_ALLOW_HTTP"),
            ("s3://b/x", [("AWS_ENDPOINT_URL", "minio:9000")].into(), "AWS_ENDPOINT_URL"),
            ("s3://b/x", [("AWS_ACCESS_KEY_ID", "AKIA")].into(), "ecret"),
            ("az://c/x", Settings::default(), "AZURE_STORAGE_ACCOUNT_NAME"),
        ];
        for (text, settings, word) in cases {
            let error = open(text, settings).unwrap_err();
            assert!(error.is_refusal() && error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn secrets_are_not_printed() {
        let settings: Settings = [
            ("AWS_ACCESS_KEY_ID", "hunter1"),
            ("AWS_SECRET_ACCESS_KEY", "hunter2"),
            ("AWS_SESSION_TOKEN", "hunter3"),
        ]
        .into();
        let clients = open("s3://b/x", settings).unwrap();
        assert!(!format!("{:?}", clients.0).contains("hunter2"), "{:?}", clients.0);
    }
}
