/**
 * The host and a QEMU guest (emulated CPU), joined by QEMU's own TAP back-end or by vhost-user, the relay and its
 * TAP: round trips, and TCP both ways with all offloads.
 *
 * The guest's CPU is emulated, so it is what limits TCP: the figures say whether the relay is in the way, not how
 * fast it is.
 */
import { macOf } from "../test/guests/linux-guest.ts";
import { nicProperties, QemuGuest } from "../test/guests/qemu.ts";
import { Relay } from "../test/guests/relay.ts";
import { digits, median, printTable, ratio, spread } from "./figures.ts";
import { ip, iperf, ping } from "./tap-host.ts";

const PINGS = 100;
const PAUSE_SECONDS = 0.005;
const TCP_SECONDS = 2;
/** A round takes several seconds. */
const ROUNDS_MAX = 3;

interface Contestant {
  readonly name: string;
  readonly guest: QemuGuest;
  readonly microseconds: number[];
  readonly toGuest: number[];
  readonly fromGuest: number[];
}

export async function compareQemu({ rounds }: { rounds: number }): Promise<void> {
  await using stack = new AsyncDisposableStack();
  const links = (socket: string) => [`vhost-user:${socket}=tap:bench-relay`];
  const { sockets } = stack.use(await Relay.start({ links }));
  const [own, relayed] = await Promise.all([
    boot(stack, "bench-qemu", { socket: "", ip: "10.98.0.2", arguments: ownTap("bench-qemu", "10.98.0.2") }),
    boot(stack, "bench-relay", { socket: sockets[0], ip: "10.98.1.2" }),
  ]);
  const contestants = [contestant("QEMU's own TAP", own), contestant("relay", relayed)];
  const turns = Math.min(rounds, ROUNDS_MAX);
  for (let round = 0; round < turns; round++) {
    for (let i = 0; i < contestants.length; i++) {
      const { guest, microseconds, toGuest, fromGuest } = contestants[(round + i) % contestants.length]!;
      microseconds.push(median(await ping(guest.ip, PINGS, PAUSE_SECONDS)));
      toGuest.push(await iperf(guest.ip, TCP_SECONDS));
      fromGuest.push(await iperf(guest.ip, TCP_SECONDS, "--reverse"));
    }
  }

  console.log(`\nqemu: the host and a QEMU guest (TCG); median (min..max) of ${turns} turns`);
  const titles = ["back-end", "ping us", "TCP to guest Mbit/s", "of QEMU's", "from guest Mbit/s", "of QEMU's"];
  const rows = contestants.map(({ name, microseconds, toGuest, fromGuest }) => [
    name,
    spread(microseconds),
    spread(toGuest),
    digits(ratio(toGuest, contestants[0]!.toGuest)),
    spread(fromGuest),
    digits(ratio(fromGuest, contestants[0]!.fromGuest)),
  ]);
  printTable([titles, ...rows]);
}

/** QEMU's arguments for memory, and a NIC with its own TAP back-end. */
function ownTap(name: string, ip: string): string[] {
  const device = ["virtio-net-pci", "netdev=nic", `mac=${macOf(ip)}`, "romfile=", ...nicProperties()].join();
  const netdev = `tap,id=nic,ifname=${name},script=no,downscript=no`;
  return ["-m", "512M", "-netdev", netdev, "-device", device];
}

async function boot(
  stack: AsyncDisposableStack,
  name: string,
  options: Parameters<typeof QemuGuest.boot>[0],
): Promise<QemuGuest> {
  const guest = stack.use(await QemuGuest.boot(options));
  ip(`address add ${guest.ip.replace(/\d+$/, "1")}/24 dev ${name}`);
  ip(`link set ${name} up`);
  await guest.check("iperf3 --server --daemon");
  await ping(guest.ip, 10, PAUSE_SECONDS); // addresses are resolved
  return guest;
}

function contestant(name: string, guest: QemuGuest): Contestant {
  return { name, guest, microseconds: [], toGuest: [], fromGuest: [] };
}
