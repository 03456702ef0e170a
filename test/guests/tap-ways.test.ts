/** The ways to an interface: each method of reading and writing it, and each way for a relay without privileges to get one. */
import { afterEach, describe, expect, test } from "vitest";
import { TAP_METHODS } from "../../src/ports/spec.ts";
import { expectDownload, expectEveryPing, serveFile } from "./guest-traffic.ts";
import { INITRAMFS_TOOLS } from "./initramfs.ts";
import { missingForNetworks, Network } from "./network.ts";
import { Relay } from "./relay.ts";
import { UmlGuest } from "./uml.ts";

const missing = missingForNetworks("linux.uml", ...INITRAMFS_TOOLS);

/** Debian's nobody and nogroup. */
const NOBODY = 65_534;

/** A command that runs this one as nobody; all that is left to it is to read a checkout that is not nobody's. */
function asNobody(command: readonly string[]): string[] {
  const capabilities = ["bounding-set", "inh-caps", "ambient-caps"].map((set) => `--${set}=-all,+dac_read_search`);
  const ids = [`--reuid=${NOBODY}`, `--regid=${NOBODY}`, "--clear-groups"];
  return ["setpriv", ...ids, ...capabilities, "--pdeathsig", "TERM", "--", ...command];
}

/** A command that opens a queue of vm0 on file descriptor 3, as linux/if_tun.h has it, and becomes this one. */
function withQueue(command: readonly string[]): string[] {
  // IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, given to TUNSETIFF
  const script = `
    $^F = 3;
    open(my $tap, "+<", "/dev/net/tun") or die "/dev/net/tun: $!";
    fileno($tap) == 3 or die "not the first that is open";
    my $request = pack("a16 S x22", "vm0", 0x5002);
    ioctl($tap, 0x400454ca, $request) or die "TUNSETIFF: $!";
    exec(@ARGV);`;
  return ["perl", "-e", script, "--", ...command];
}

describe.skipIf(missing !== undefined)(`ways to a TAP interface${missing ? `: ${missing}` : ""}`, () => {
  const open = new Set<AsyncDisposable>();

  function keep<T extends AsyncDisposable>(resource: T): T {
    open.add(resource);
    return resource;
  }

  async function makeNetwork(tap: string): Promise<Network> {
    const network = keep(await Network.make());
    await network.check(`
      ${tap}
      ip addr add ${network.ip}/24 dev vm0
      ip link set vm0 up`);
    return network;
  }

  /** Boots a guest on the relay; pings and TCP, both ways. */
  async function expectTraffic(network: Network, relay: Relay): Promise<void> {
    const guest = keep(await UmlGuest.boot({ socket: relay.sockets[0], ip: "10.0.0.1" }));
    for (const [from, to] of [
      [guest, network],
      [network, guest],
    ] as const) {
      await serveFile(from, 4);
      for (const bytes of [56, 8000]) await expectEveryPing(from, to, bytes);
      await expectDownload(from, to);
    }
    expect(relay.log).not.toMatch(/error|exception|unhandled|fatal|trap/i);
  }

  afterEach(async () => {
    for (const resource of [...open].toReversed()) await resource[Symbol.asyncDispose]();
    open.clear();
  });

  test.each(TAP_METHODS)("io=%s", async (method) => {
    const network = await makeNetwork("ip tuntap add dev vm0 mode tap multi_queue vnet_hdr");
    const relay = keep(await Relay.toTap(`tap:vm0,io=${method}`, network));
    await expectTraffic(network, relay);
    expect(relay.log).toContain(`interface vm0 is reached by ${method}`);
  });

  test("an interface that root has made for a user, and a relay that is that user's", async () => {
    const network = await makeNetwork(`ip tuntap add dev vm0 mode tap multi_queue vnet_hdr user ${NOBODY}`);
    const relay = keep(
      await Relay.start({
        links: (path) => [`vhost-user:${path}=tap:vm0`],
        wrap: (command) => network.inside(asNobody(command)),
        owner: NOBODY,
      }),
    );
    await expectTraffic(network, relay);
  });

  test("a queue that is inherited, and a relay that may do nothing with interfaces", async () => {
    const network = await makeNetwork("ip tuntap add dev vm0 mode tap vnet_hdr");
    const relay = keep(
      await Relay.start({
        links: (path) => [`vhost-user:${path}=tap:fd=3`],
        wrap: (command) => network.inside(withQueue(asNobody(command))),
        owner: NOBODY,
      }),
    );
    await expectTraffic(network, relay);
  });
});
