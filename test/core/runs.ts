/** How often a property is tried: VHOST_RELAY_TEST_RUNS multiplies it, for longer searches than `npm test` has time for. */
export function runs(count: number): number {
  return Math.ceil(count * Number(process.env["VHOST_RELAY_TEST_RUNS"] ?? 1));
}
