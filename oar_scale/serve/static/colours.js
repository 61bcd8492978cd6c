/** Colour maps that people with any colour vision can read: lightness only grows. Viridis for orders (as in the report), cividis for confidence. */

const STOPS = {
  order: "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c 1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725",
  confidence: "00224e 002e6a 1a386f 32436d 434e6c 535a6d 61656f 6f7073 7d7c78 8c8878 9b9476 aba072 bcae6c cdbb63 dec958 f0d846 fee838",
};

const MAPS = Object.fromEntries(
  Object.entries(STOPS).map(([name, stops]) => [name, stops.split(" ").map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)))]),
);

/** Red, green and blue, 0 to 255, of a value from 0 to 1. */
export function colour(map, value) {
  const stops = MAPS[map];
  const at = Math.min(Math.max(value, 0), 1) * (stops.length - 1);
  const below = Math.min(Math.floor(at), stops.length - 2);
  return stops[below].map((start, channel) => Math.round(start + (stops[below + 1][channel] - start) * (at - below)));
}

/** Black or white, whichever is easier to read on this colour. */
export function inkOn([red, green, blue]) {
  return 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#000" : "#fff";
}

/** Fill a canvas with the map from left to right. */
export function paintRamp(canvas, map) {
  const context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    context.fillStyle = `rgb(${colour(map, x / (canvas.width - 1))})`;
    context.fillRect(x, 0, 1, canvas.height);
  }
}
