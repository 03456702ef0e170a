/** The variants of the core: how many segments an end has in each. `npm run core` builds them, a lane takes the smallest that does. */
export const VARIANTS = [1, 2, 5];
