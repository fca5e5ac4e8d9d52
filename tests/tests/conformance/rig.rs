//! Services with functions of several shapes, and devices on them.

use anyhow::{Context, Result, ensure};
use ferry_tests::{Service, ServiceConfig, TempDir};
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

/// The numbers of MSI-X vectors that functions have: one manager for each.
pub(crate) const VECTORS: [u16; 3] = [1, 3, 63];

/// A service with one static function for each of [`VECTORS`], and a vhost-user transport.
pub(crate) struct Rig {
    pub(crate) service: Service,
    _platform: TempDir,
}

/// What to start, and for which driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// The function with so many vectors.
    Pci(u16),
    VhostUser,
}

impl Rig {
    pub(crate) fn new() -> Result<Rig> {
        let platform = TempDir::new();
        fs::set_permissions(platform.path(), fs::Permissions::from_mode(0o755))?;
        let mut text = String::new();
        for (n, vectors) in VECTORS.into_iter().enumerate() {
            write!(
                text,
                "[[manager]]\nname = \"mlx5_{n}\"\nserial = \"MT2333XZ0VJ{n}\"\nbus = {}\n[manager.firmware]\n\
                 VIRTIO_FS_EMULATION_ENABLE = 1\nVIRTIO_FS_EMULATION_NUM_PF = 1\nVIRTIO_FS_EMULATION_NUM_MSIX = {vectors}\n",
                0x29 + 0x10 * n,
            )?;
        }
        let file = platform.join("platform.toml");
        fs::write(&file, text)?;
        let service = Service::start_with(&ServiceConfig {
            args: vec!["--platform".to_owned(), file.display().to_string()],
            ..ServiceConfig::default()
        })?;
        let export = service.dir().make_dir("export");
        fs::write(export.join("file"), "content\n")?;
        service.call(&format!("fsdev_aio_create aio0 {}", export.display()))?;
        service.call("virtio_fs_transport_create -t DOCA")?;
        for n in 0..VECTORS.len() {
            service.call(&format!("virtio_fs_doca_manager_create -m mlx5_{n}"))?;
        }
        service.call("virtio_fs_transport_start -t DOCA")?;
        service.call("virtio_fs_transport_create -t VHOST_USER")?;
        service.call("virtio_fs_transport_start -t VHOST_USER")?;
        Ok(Rig {
            service,
            _platform: platform,
        })
    }

    /// Starts device `name` with so many request queues, which may be packed; gives its socket.
    pub(crate) fn start(&self, name: &str, place: Place, queues: u16) -> Result<PathBuf> {
        let (transport, size) = match place {
            Place::Pci(_) => ("DOCA", 256),
            Place::VhostUser => ("VHOST_USER", 64),
        };
        self.service.call(&format!(
            "virtio_fs_device_create --transport-name {transport} --dev-name {name} --tag {name} --fsdev aio0 \
             --num-request-queues {queues} --queue-size {size} --packed-vq"
        ))?;
        let run = self.service.run_dir();
        let socket = match place {
            Place::Pci(vectors) => {
                let (manager, vuid) = self.function(vectors)?;
                self.service.call(&format!(
                    "virtio_fs_doca_device_modify --dev-name {name} --manager {manager} --vuid {vuid}"
                ))?;
                run.join("pci").join(format!("{vuid}.sock"))
            }
            Place::VhostUser => run.join("vhost").join(format!("{name}.sock")),
        };
        self.service
            .call(&format!("virtio_fs_device_start --dev-name {name}"))?;
        Ok(socket)
    }

    /// Takes device `name` away again.
    pub(crate) fn end(&self, name: &str) -> Result<()> {
        self.service
            .call(&format!("virtio_fs_device_stop --dev-name {name}"))?;
        self.service
            .call(&format!("virtio_fs_device_destroy --dev-name {name}"))?;
        Ok(())
    }

    /// The manager and the VUID of the function with so many vectors.
    fn function(&self, vectors: u16) -> Result<(String, String)> {
        let at = VECTORS.iter().position(|v| *v == vectors);
        let manager = format!("mlx5_{}", at.context("no function has so many vectors")?);
        let managers = self.service.call("virtio_fs_doca_get_functions")?;
        let managers = managers.as_array().context("no list of managers")?;
        let ours = managers.iter().find(|m| m["manager"] == manager);
        let ours = ours.with_context(|| format!("no {manager} in {managers:?}"))?;
        let vuid = ours["Function List"][0]["vuid"].as_str();
        Ok((manager, vuid.context("no function")?.to_owned()))
    }

    /// Whether the service still runs as it was started, and has nothing to complain about.
    pub(crate) fn check(&mut self) -> Result<()> {
        ensure!(self.service.running()?, "the service has ended");
        let log = self.service.log();
        let bad = |line: &&str| line.contains(" ERROR ") || line.contains("panicked");
        let complaint = log.lines().find(bad);
        ensure!(complaint.is_none(), "the service complains:\n{log}");
        Ok(())
    }
}
