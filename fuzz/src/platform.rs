//! Platform files.

use std::collections::BTreeSet;
use std::path::Path;

use ferry_dataplane::platform::Platform;

/// A platform file: what is accepted names every function once, and finds it again.
pub fn file(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let platform = match Platform::parse(Path::new("platform.toml"), text) {
        Ok(platform) => platform,
        Err(error) => {
            assert!(error.to_string().contains("platform.toml"), "{error}");
            return;
        }
    };
    let (mut vuids, mut addresses) = (BTreeSet::new(), BTreeSet::new());
    for manager in platform.managers() {
        for function in manager.functions.iter().chain(&manager.ports) {
            assert!(vuids.insert(&function.vuid), "{} twice", function.vuid);
            assert!(addresses.insert(&function.pci_address));
            let found = platform.find(&manager.name, &function.vuid);
            assert_eq!(found.expect("it is there").vuid, function.vuid);
        }
    }
}
