/* Everything that Ferry's wire structs are compared with. */
#include <linux/fuse.h>
#include <linux/pci_regs.h>
#include <linux/vfio.h>
#include <linux/vhost_types.h>
#include <linux/virtio_config.h>
#include <linux/virtio_fs.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_pci.h>
#include <linux/virtio_ring.h>
