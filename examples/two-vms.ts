/**
 * A relay inside your own program: joins two virtual machines, prints what moves, stops on Ctrl-C.
 *
 *   node examples/two-vms.ts /run/a.sock /run/b.sock
 *
 * Outside this repository the import reads `from "vhost-relay"`.
 */
import { Relay } from "../src/index.ts";

const [a = "/run/a.sock", b = "/run/b.sock"] = process.argv.slice(2);

await using relay = await Relay.start({
  links: [[`vhost-user:${a}`, `vhost-user:${b}`]],
  onEvent: (event) => console.error("event:", event.type),
});
console.log(`waiting for virtual machines on ${a} and ${b}`);

const timer = setInterval(() => {
  for (const { from, packets, drops } of relay.state.links.flatMap((link) => link.lanes)) {
    console.log(`${from}: ${packets} packets`, drops);
  }
}, 1000);

await new Promise((resolve) => process.once("SIGINT", resolve).once("SIGTERM", resolve));
clearInterval(timer);
