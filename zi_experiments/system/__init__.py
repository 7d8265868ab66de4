"""Facts about this machine: devices, disks, tools."""
