/** `vhost-relay run`: serves links until SIGTERM or SIGINT. */
import { ownControlSocket, serveControl } from "../control/api.ts";
import { EventLog } from "../control/log.ts";
import type { PollMode } from "../datapath/poller.ts";
import { Relay } from "../datapath/relay.ts";
import { ConfigError } from "../errors.ts";

export interface RunOptions {
  link: string[];
  socketPath?: string;
  backend?: string;
  poll: PollMode;
  cpus: number[];
  stallMs: number;
  control?: string;
}

export async function run(options: RunOptions): Promise<void> {
  const stop = Promise.withResolvers<void>();
  let failure: unknown;
  const log = new EventLog(process.stderr);
  const relay = await Relay.start({
    links: linksOf(options),
    poll: options.poll,
    cpus: options.cpus,
    stallMs: options.stallMs,
    onEvent: (event) => {
      log.write(event);
      if (event.type === "fatal") {
        failure = event.error;
        stop.resolve();
      }
    },
  });
  await using _relay = relay;
  await using _control = await serveControl(relay, options.control ?? ownControlSocket());
  for (const signal of ["SIGTERM", "SIGINT"] as const) process.once(signal, () => stop.resolve());
  await stop.promise;
  if (failure !== undefined) process.exitCode = 1;
}

function linksOf({ link, socketPath, backend }: RunOptions): [string, string][] {
  const links = link.map((text): [string, string] => {
    // Both ends may hold '=' in options (queues=2): the link's own is the one before a port's kind.
    const parts = /^(.+?)=((?:vhost-user:|loopback$|null$).*)$/.exec(text);
    if (!parts?.[1] || !parts[2])
      throw new ConfigError(
        `--link "${text}": write two ports joined by "=", for example vhost-user:/run/a.sock=vhost-user:/run/b.sock`,
      );
    return [parts[1], parts[2]];
  });
  if ((socketPath === undefined) !== (backend === undefined))
    throw new ConfigError("--socket-path and --backend belong together");
  if (socketPath !== undefined && backend !== undefined) links.push([`vhost-user:${socketPath}`, backend]);
  if (links.length === 0)
    throw new ConfigError("nothing to serve: give --link A=B, or --socket-path PATH --backend PORT");
  return links;
}
