/** The numbers of src/layout/virtio.ts and tun.ts against the kernel's own headers, through a few lines of C. */
import { spawnSync } from "node:child_process";
import { existsSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, test } from "vitest";
import * as tun from "../../src/layout/tun.ts";
import * as virtio from "../../src/layout/virtio.ts";

const HEADERS = [
  "linux/virtio_ring.h",
  "linux/virtio_net.h",
  "linux/virtio_config.h",
  "linux/vhost_types.h",
  "linux/if_ether.h",
  "linux/ioctl.h",
  "linux/sockios.h",
  "linux/if.h",
  "linux/filter.h",
  "linux/if_tun.h",
  "linux/rtnetlink.h",
];

/** What each constant is in C. */
const inC: Record<string, string> = {
  DESC_SIZE: "sizeof(struct vring_desc)",
  DESC_ADDR: "offsetof(struct vring_desc, addr)",
  DESC_LEN: "offsetof(struct vring_desc, len)",
  DESC_FLAGS: "offsetof(struct vring_desc, flags)",
  AVAIL_FLAGS: "offsetof(struct vring_avail, flags)",
  AVAIL_IDX: "offsetof(struct vring_avail, idx)",
  AVAIL_RING: "offsetof(struct vring_avail, ring)",
  AVAIL_ENTRY_SIZE: "sizeof(((struct vring_avail *)0)->ring[0])",
  USED_FLAGS: "offsetof(struct vring_used, flags)",
  USED_IDX: "offsetof(struct vring_used, idx)",
  USED_RING: "offsetof(struct vring_used, ring)",
  USED_ENTRY_SIZE: "sizeof(struct vring_used_elem)",
  USED_ENTRY_ID: "offsetof(struct vring_used_elem, id)",
  USED_ENTRY_LEN: "offsetof(struct vring_used_elem, len)",
  DESC_ALIGN: "VRING_DESC_ALIGN_SIZE",
  AVAIL_ALIGN: "VRING_AVAIL_ALIGN_SIZE",
  USED_ALIGN: "VRING_USED_ALIGN_SIZE",
  PACKED_DESC_LEN: "offsetof(struct vring_packed_desc, len)",
  PACKED_DESC_ID: "offsetof(struct vring_packed_desc, id)",
  PACKED_DESC_FLAGS: "offsetof(struct vring_packed_desc, flags)",
  PACKED_EVENT_OFF_WRAP: "offsetof(struct vring_packed_desc_event, off_wrap)",
  PACKED_EVENT_FLAGS: "offsetof(struct vring_packed_desc_event, flags)",
  PACKED_EVENT_SIZE: "sizeof(struct vring_packed_desc_event)",
  NET_HDR_FLAGS: "offsetof(struct virtio_net_hdr, flags)",
  NET_HDR_GSO_TYPE: "offsetof(struct virtio_net_hdr, gso_type)",
  NET_HDR_HDR_LEN: "offsetof(struct virtio_net_hdr, hdr_len)",
  NET_HDR_GSO_SIZE: "offsetof(struct virtio_net_hdr, gso_size)",
  NET_HDR_CSUM_START: "offsetof(struct virtio_net_hdr, csum_start)",
  NET_HDR_CSUM_OFFSET: "offsetof(struct virtio_net_hdr, csum_offset)",
  NET_HDR_NUM_BUFFERS: "offsetof(struct virtio_net_hdr_mrg_rxbuf, num_buffers)",
  NET_HDR_SIZE_LEGACY: "sizeof(struct virtio_net_hdr)",
  NET_HDR_SIZE: "sizeof(struct virtio_net_hdr_mrg_rxbuf)",
  NET_CONFIG_MAC: "offsetof(struct virtio_net_config, mac)",
  NET_CONFIG_STATUS: "offsetof(struct virtio_net_config, status)",
  NET_CONFIG_MAX_VIRTQUEUE_PAIRS: "offsetof(struct virtio_net_config, max_virtqueue_pairs)",
  NET_CONFIG_MTU: "offsetof(struct virtio_net_config, mtu)",
  NET_CONFIG_SIZE: "offsetof(struct virtio_net_config, speed)", // the first field that is not served
  MTU_MIN: "ETH_MIN_MTU",
  MTU_MAX: "ETH_MAX_MTU",
  IFREQ_SIZE: "sizeof(struct ifreq)",
  IFREQ_FLAGS: "offsetof(struct ifreq, ifr_flags)",
  IFREQ_HWADDR: "offsetof(struct ifreq, ifr_hwaddr.sa_data)",
  SOCK_FPROG_SIZE: "sizeof(struct sock_fprog)",
  SOCK_FPROG_FILTER: "offsetof(struct sock_fprog, filter)",
  SOCK_FILTER_SIZE: "sizeof(struct sock_filter)",
  BPF_RET_K: "BPF_RET | BPF_K",
  NLA_TYPE_MASK: "0xffff & NLA_TYPE_MASK",
  NLMSG_TYPE: "offsetof(struct nlmsghdr, nlmsg_type)",
  NLMSG_FLAGS: "offsetof(struct nlmsghdr, nlmsg_flags)",
  IFINFOMSG_SIZE: "sizeof(struct ifinfomsg)",
  IFINFOMSG_INDEX: "offsetof(struct ifinfomsg, ifi_index)",
  IFINFOMSG_FLAGS: "offsetof(struct ifinfomsg, ifi_flags)",
  IFINFOMSG_CHANGE: "offsetof(struct ifinfomsg, ifi_change)",
};

/** What no kernel header says, with where it is said instead. */
const elsewhere: Record<string, string> = {
  VRING_SIZE_MAX: "virtio 1.3, 2.7: the queue size is at most 32768",
  PACKED_EVENT_ALIGN: "virtio 1.3, 2.8.10.1: the event suppression structures are aligned to 4 bytes",
  VHOST_USER_F_PROTOCOL_FEATURES: "QEMU docs/interop/vhost-user.rst: bit 30",
  RECEIVEQ: "virtio 1.3, 5.1.2: receiveq1 is virtqueue 0",
  TRANSMITQ: "virtio 1.3, 5.1.2: transmitq1 is virtqueue 1",
  VIRTIO_NET_F_GUEST_USO4: "virtio 1.3, 5.1.3: bit 54; headers before Linux 6.2 lack it",
  VIRTIO_NET_F_GUEST_USO6: "virtio 1.3, 5.1.3: bit 55; headers before Linux 6.2 lack it",
  VIRTIO_NET_F_HOST_USO: "virtio 1.3, 5.1.3: bit 56; headers before Linux 6.2 lack it",
  TUN_F_USO4: "linux/if_tun.h since Linux 6.2: 0x20",
  TUN_F_USO6: "linux/if_tun.h since Linux 6.2: 0x40",
};

/** The value in C of each expression; a string says why there is none. */
function evaluate(expressions: readonly string[]): number[] | string {
  const include = HEADERS.map((header) => `#include <${header}>`).join("\n");
  const prints = expressions.map((expression) => `printf("%ld\\n", (long)(${expression}));`).join("\n");
  const program = `#include <stddef.h>\n#include <stdio.h>\n${include}\nint main(void) {\n${prints}\nreturn 0;\n}\n`;
  const missing = HEADERS.find((header) => !existsSync(join("/usr/include", header)));
  if (missing) return `no ${missing}: install linux-libc-dev`;
  const directory = mkdtempSync(join(tmpdir(), "kernel-headers-"));
  try {
    const binary = join(directory, "numbers");
    const compiled = spawnSync("cc", ["-x", "c", "-", "-o", binary], { input: program, encoding: "utf8" });
    if (compiled.error) return `no C compiler: ${compiled.error.message}`;
    if (compiled.status !== 0) throw new Error(compiled.stderr);
    return spawnSync(binary, { encoding: "utf8" }).stdout.trim().split("\n").map(Number);
  } finally {
    rmSync(directory, { recursive: true });
  }
}

const files: [string, Record<string, number>][] = [
  ["virtio.ts", virtio],
  ["tun.ts", tun],
];

test.for(files)("every constant of src/layout/%s is the kernel's", ([, constants], context) => {
  const names = Object.keys(constants).filter((name) => !(name in elsewhere));
  // names that the headers spell the same
  const result = evaluate(names.map((name) => inC[name] ?? name));
  if (typeof result === "string") {
    if (process.env["CI"] === "true") expect.fail(result);
    context.skip(result);
    return;
  }
  const expected = Object.fromEntries(names.map((name, i) => [name, result[i]]));
  const actual = Object.fromEntries(Object.entries(constants).filter(([name]) => !(name in elsewhere)));
  expect(actual).toEqual(expected);
});

test("the constants that not every header has are what is said elsewhere", () => {
  const said = {
    VRING_SIZE_MAX: 32_768,
    PACKED_EVENT_ALIGN: 4,
    VHOST_USER_F_PROTOCOL_FEATURES: 30,
    RECEIVEQ: 0,
    TRANSMITQ: 1,
    VIRTIO_NET_F_GUEST_USO4: 54,
    VIRTIO_NET_F_GUEST_USO6: 55,
    VIRTIO_NET_F_HOST_USO: 56,
    TUN_F_USO4: 0x20,
    TUN_F_USO6: 0x40,
  };
  expect({ ...virtio, ...tun }).toMatchObject(said);
  expect(Object.keys(said)).toEqual(Object.keys(elsewhere));
});
