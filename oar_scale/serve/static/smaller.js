/** Copies of pictures that are larger than the server takes, as those of many phones are. */

/** Copies have somewhat fewer pixels than allowed, as their sides are rounded. */
const SPARE = 0.99;

/** A copy (a Blob) of at most so many pixels and bytes. Rejects where this browser cannot read the picture. */
export async function smallerCopy(blob, { pixels, upload_bytes: bytes }) {
  const whole = await createImageBitmap(blob);
  for (let scale = Math.min(1, Math.sqrt((SPARE * pixels) / (whole.width * whole.height))); ; scale *= 0.7) {
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.floor(whole.width * scale));
    canvas.height = Math.max(1, Math.floor(whole.height * scale));
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(whole, 0, 0, canvas.width, canvas.height);
    for (const type of new Set([blob.type, "image/jpeg"])) {
      const copy = await new Promise((resolve) => canvas.toBlob(resolve, type, 0.92));
      if (copy.size <= bytes) return copy;
    }
  }
}
