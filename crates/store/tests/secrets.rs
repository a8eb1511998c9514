//! Nobody logs a secret: everything that is logged while stores are read and requests fail, at the most verbose level, by
//! this crate and all below it.
#![expect(clippy::unwrap_used, reason = "a test says so by failing")]

mod support;

use std::{
    io::{self, Write},
    sync::{Arc, Mutex},
    time::Duration,
};

use longshore_storage_server::{Action, At, Dialect, Options, Rule, Server};
use longshore_store::{Settings, Store, StoreOptions};
use support::{NAME, content, location, options, serve};

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Everything that can be asked, with and without faults. The texts of all errors.
fn everything(server: &Server, dialect: Dialect, options: &StoreOptions) -> String {
    let options = StoreOptions { give_up_after: Duration::from_millis(300), ..options.clone() };
    let mut texts = String::new();
    let store = match Store::open(&location(dialect), &options) {
        Ok(store) => store,
        Err(error) => return format!("{error} {error:?}"),
    };
    let mut tell = |text: Option<String>| texts.push_str(&text.unwrap_or_default());
    tell(Some(format!("{store:?} {options:?}")));
    tell(store.list().err().map(|error| format!("{error:?}")));
    let Ok(Some(info)) = store.info(NAME) else { return texts };
    let object = store.object(&info);
    for fault in [
        None,
        Some(Action::status(500)),
        Some(Action::status(403)),
        Some(Action::Reset { at: Some(At::Middle) }),
    ] {
        server.clear_faults();
        if let Some(fault) = fault {
            server.fault(Rule::new(fault));
        }
        let errors = [
            store.list().err(),
            store.info(NAME).err(),
            store.get(NAME, 1 << 20).err(),
            object.read(0..1000, &mut [0; 1000]).err(),
        ];
        for error in errors.into_iter().flatten() {
            tell(Some(format!("{error} {error:?}")));
        }
    }
    server.clear_faults();
    texts
}

#[test]
fn nothing_that_is_logged_or_said_holds_a_secret() {
    let log = Log::default();
    let writer = log.clone();
    tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::TRACE)
        .with_writer(move || writer.clone())
        .init();
    let mut texts = String::new();
    let mut secrets = Vec::new();
    for dialect in [Dialect::S3, Dialect::Gcs, Dialect::Azure, Dialect::Hub] {
        let server = serve(Options { private: true, ..Options::default() }, &content(100_000));
        texts.push_str(&everything(&server, dialect, &options(&server, dialect)));
        if dialect == Dialect::Azure {
            let signed = server.environment_with(dialect, false).into_iter();
            let signed = signed.filter(|(name, _)| *name != "AZURE_SKIP_SIGNATURE");
            let token = "sv=2024-01-01&sr=c&sig=hunter2hunter2";
            let signed = signed.chain([("AZURE_STORAGE_SAS_TOKEN", token.to_owned())]);
            let settings: Settings = signed.map(|(name, value)| (name.to_owned(), value)).collect();
            texts.push_str(&everything(
                &server,
                dialect,
                &StoreOptions { settings, ..StoreOptions::default() },
            ));
        }
        secrets.extend(server.secrets());
    }
    secrets.push("hunter2".to_owned());
    let logged = String::from_utf8_lossy(&log.0.lock().unwrap()).into_owned();
    assert!(
        logged.contains("TRACE") && logged.contains("request failed"),
        "{} bytes are logged",
        logged.len()
    );
    for secret in secrets {
        assert!(!texts.contains(&secret), "{secret} is said");
        let line = logged.lines().find(|line| line.contains(&secret));
        assert_eq!(line, None, "{secret} is logged");
    }
}
